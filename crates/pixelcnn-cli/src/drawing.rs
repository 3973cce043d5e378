//! What `sample` and `complete` have in common: how images are drawn and written.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, value_parser};
use pixelcnn::ModelConfig;
use pixelcnn::data::CodeMaps;
use pixelcnn::picture::{grid, write_png};
use pixelcnn::sample::Drawn;

use crate::output::{Overwrite, make_folder};
use crate::terminal::{Bar, Result, duration, interrupted};
use crate::trained::Trained;

/// White pixels between the images of a grid, before they are enlarged.
pub const GAP: usize = 1;

/// Flags of both commands.
#[derive(Debug, Args)]
pub struct Drawing {
    /// 1 draws from the model; less draws likelier, smoother images
    #[arg(long, value_name = "T", default_value = "1", value_parser = temperature)]
    #[arg(allow_negative_numbers = true)]
    pub temperature: f32,
    /// Another seed draws other images
    #[arg(long, value_name = "N", default_value = "1")]
    pub seed: u64,
    /// Folder for each image as a PNG file of its own as well: 0000.png, ... [default: none]
    #[arg(long, value_name = "DIR")]
    pub singles: Option<PathBuf>,
    /// Enlarge every pixel to K x K
    #[arg(long, value_name = "K", default_value = "1")]
    #[arg(value_parser = value_parser!(u8).range(1..=64))]
    pub scale: u8,
    /// Use the parameters as trained last, not their Polyak average
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub overwrite: Overwrite,
}

impl Drawing {
    /// The file to write, where none is named `NAME.png` or, where the model draws codes, `NAME.npy`; once
    /// nothing is asked for that codes can't be.
    pub fn output(
        &self,
        model: &ModelConfig,
        asked: &Option<PathBuf>,
        name: &str,
        animate: bool,
    ) -> Result<PathBuf> {
        let codes = model.nr_codes > 0;
        let kind = if codes { "npy" } else { "png" };
        let output = self.overwrite.or_free(asked, &format!("{name}.{kind}"));
        let pictures = [
            ("--singles", self.singles.is_some()),
            ("--scale", self.scale != 1),
            ("--animate", animate),
        ];
        let refused = pictures.into_iter().find(|(_, asked)| codes && *asked);
        if let Some((flag, _)) = refused {
            let why = "the model draws codes, not pictures: leave it out";
            return Err(format!("{flag}: {why}").into());
        }
        if !output.to_string_lossy().ends_with(&format!(".{kind}")) {
            let what = if codes { "codes" } else { "pictures" };
            let output = output.display();
            return Err(format!(
                "{output}: the model draws {what}: give a name that ends in .{kind}"
            )
            .into());
        }
        Ok(output)
    }

    /// From what images were drawn, and how fast.
    pub fn summary(&self, trained: &Trained, images_per_second: f64) -> String {
        format!(
            "({} weights, step {}, temperature {}, seed {}), {images_per_second:.2} images/s",
            trained.kind(self.raw),
            trained.step(),
            self.temperature,
            self.seed
        )
    }
}

fn temperature(text: &str) -> std::result::Result<f32, String> {
    match text.parse::<f32>() {
        Ok(temperature) if temperature.is_finite() && temperature > 0.0 => Ok(temperature),
        _ => Err("must be a number above 0".into()),
    }
}

/// Reads the coarser maps that a model of codes is given; none where it is given none.
pub fn coarse_maps(model: &ModelConfig, path: Option<&Path>) -> Result<Option<CodeMaps>> {
    match (model.nr_coarse_codes, path) {
        (0, None) => Ok(None),
        (0, Some(_)) => Err("--coarse: the model is given no coarser maps: leave it out".into()),
        (_, Some(path)) => Ok(Some(CodeMaps::read(path)?)),
        (_, None) => Err(
            "the model is given coarser maps: name the .npy file that has them with --coarse"
                .into(),
        ),
    }
}

/// Parses the name of a PNG file, or of a .npy file for codes.
pub fn png_or_npy(path: &str) -> std::result::Result<PathBuf, String> {
    match path.ends_with(".png") || path.ends_with(".npy") {
        true => Ok(path.into()),
        false => {
            Err("give a name that ends in .png, or in .npy where the model draws codes".into())
        }
    }
}

/// Parses the name of a PNG file.
pub fn png(path: &str) -> std::result::Result<PathBuf, String> {
    match path.ends_with(".png") {
        true => Ok(path.into()),
        false => Err("give a name that ends in .png".into()),
    }
}

/// Checks that a grid of so many images can be made, and that its files and those of the single
/// images can be written, before the long work.
pub fn prepare(
    images: usize,
    columns: usize,
    drawing: &Drawing,
    model: &ModelConfig,
    files: &[Option<&PathBuf>],
    singles: usize,
) -> Result {
    if model.nr_codes == 0 {
        let shape = [images, model.height, model.width, model.channels];
        let scale = drawing.scale.into();
        grid(&vec![0; images * model.dims()], shape, columns, GAP, scale)?;
    }
    for file in files.iter().flatten() {
        drawing.overwrite.prepare(file)?;
    }
    if let Some(folder) = &drawing.singles {
        make_folder(folder)?;
        (0..singles).try_for_each(|i| drawing.overwrite.expect_free(&single(folder, i)))?;
    }
    Ok(())
}

/// The file of a single image.
fn single(folder: &Path, image: usize) -> PathBuf {
    folder.join(format!("{image:04}.png"))
}

/// Shows progress until `images` are drawn, of which this process may draw a share alone, or Ctrl-C is
/// pressed.
pub fn progress(
    bar: &mut Bar,
    model: &ModelConfig,
    images: usize,
) -> impl FnMut(Drawn) -> ControlFlow<()> {
    let start = Instant::now();
    let pixels = (model.height * model.width) as f64;
    let total = images as f64 * pixels;
    move |drawn| {
        // The others are as far.
        let done = drawn.done as f64 / drawn.total as f64 * total;
        bar.show(done as u64, total as u64, || {
            let seconds = start.elapsed().as_secs_f64();
            format!(
                "{:.1} of {} images  {:.2} images/s  {} left",
                done / pixels,
                total / pixels,
                done / pixels / seconds,
                duration((seconds * (total / done - 1.0)).round())
            )
        });
        interrupted()
    }
}

/// Writes each image to a PNG file of its own.
pub fn write_singles(folder: &Path, images: &[u8], scale: usize, model: &ModelConfig) -> Result {
    let one = [1, model.height, model.width, model.channels];
    for (i, image) in images.chunks_exact(model.dims()).enumerate() {
        write_png(&single(folder, i), &grid(image, one, 1, 0, scale)?)?;
    }
    Ok(())
}
