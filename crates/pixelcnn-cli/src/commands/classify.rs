//! `pixelcnn classify`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use clap::Args;
use pixelcnn::ModelConfig;
use pixelcnn::atomic;
use pixelcnn::classify::{Classification, classify};
use pixelcnn::data::{DataConfig, Dataset};
use pixelcnn::device::Device;
use pixelcnn::evaluate::expect_images;
use pixelcnn::incremental::EvaluatorError;
use pixelcnn::network::Network;

use crate::confusion;
use crate::device::DeviceFlags;
use crate::measuring::{ImageFlags, share_out};
use crate::output::{Overwrite, make_folder};
use crate::ranks::{GpuFlags, Team, common, together};
use crate::settings::DataFlags;
use crate::terminal::{Result, catch_interrupts, counted, note, note_dropped, say};
use crate::trained::Trained;

/// What is written.
const FILES: [&str; 3] = ["probabilities.csv", "confusion.csv", "confusion.png"];
/// Images whose classes are told in the terminal, where nobody knows whether they are right.
const NAMED: usize = 5;

/// Find the classes of images.
///
/// A class-conditional model tells how likely an image is in each class, and so by Bayes' rule how
/// likely each class is for the image, all of them as likely beforehand. It takes an evaluation for
/// every class.
///
/// Writes a folder: probabilities.csv has the probability of each class for each image. Where the
/// images have classes of their own, confusion.csv and confusion.png show how many of each class
/// were found to be of each.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Classify {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights of a model that was
    /// trained with --class-conditional
    #[arg(value_name = "RUN|FILE")]
    run: PathBuf,
    #[command(flatten)]
    images: ImageFlags,
    /// Folder for all files [default: classes, or classes-2 and so on where that is there]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    overwrite: Overwrite,
    #[command(flatten)]
    ranks: GpuFlags,
    #[command(flatten)]
    data: DataFlags,
}

const EXAMPLES: &str = "\
The data are the run's own where the data flags leave them out.

Examples:
  pixelcnn classify runs/classes
      how many test images are found to be of their class, in classes
  pixelcnn classify runs/classes --data photos --size 32
      the classes of other pictures";

/// What a classification needs.
struct Prepared {
    device: Device,
    trained: Trained,
    network: Network,
    data: Dataset,
    /// Of the model's classes.
    names: Vec<String>,
    /// Whether the images' own classes are those.
    comparable: bool,
    output: PathBuf,
    batch_size: usize,
}

impl Classify {
    /// Runs the command, as one of the ranks that share the images.
    pub fn run(&self, device: &DeviceFlags) -> Result<ExitCode> {
        together(self.ranks, |team| self.classify(device, team))
    }

    fn classify(&self, device: &DeviceFlags, team: &Team) -> Result<ExitCode> {
        let Prepared {
            trained,
            mut network,
            data,
            names,
            comparable,
            output,
            batch_size,
            ..
        } = team.prepare(
            || self.prepare(device, team),
            |Prepared {
                 trained,
                 device,
                 data,
                 ..
             }| common(self, trained, self.images.raw, *device, &[data]),
        )?;
        let count = self.images.count(&data);
        let parts = share_out(&*team.ranks, count, |own, progress| {
            let mut progress = |so_far: &Classification| {
                let accuracy = so_far.accuracy();
                let accuracy = accuracy.map(|share| format!("{:.1} % right", 100.0 * share));
                progress(so_far.len(), &accuracy.unwrap_or_default())
            };
            Ok(classify(
                &mut network,
                &data,
                own,
                batch_size,
                &mut progress,
            )?)
        })?;
        if !team.leads() {
            return Ok(ExitCode::SUCCESS);
        }
        let mut found = Classification::concat(parts);
        if !comparable {
            found.labels.clear();
        }
        say(self.summary(&trained, &found, &names, &data))?;
        let [probabilities, counts, picture] = FILES.map(|file| output.join(file));
        write_table(&probabilities, probabilities_of(&found, &names, &data)?)?;
        if !found.labels.is_empty() {
            let confusion = found.confusion();
            write_table(&counts, confusion_of(&confusion, &names)?)?;
            confusion::write(&picture, &confusion, &names)?;
        } else {
            for earlier in [counts, picture] {
                if earlier.is_file() {
                    fs::remove_file(&earlier).map_err(|error| {
                        format!("cannot remove `{}`: {error}", earlier.display())
                    })?;
                    note(format_args!(
                        "{}: removed, of an earlier classification",
                        earlier.display()
                    ));
                }
            }
        }
        say(format_args!("in {}", output.display()))?;
        Ok(ExitCode::SUCCESS)
    }

    fn prepare(&self, device: &DeviceFlags, team: &Team) -> Result<Prepared> {
        let device = device.find_for(team)?;
        let trained = Trained::open(Some(&self.run), "classify")?;
        let model = trained.model();
        EvaluatorError::unless_likelihood(model)?;
        if model.nr_classes == 0 {
            return Err(format!(
                "{}: the model knows no classes: train one with --class-conditional",
                self.run.display()
            )
            .into());
        }
        let network = trained.network(self.images.raw, &device)?;
        let output = self.overwrite.or_free(&self.output, "classes");
        if team.leads() {
            for file in FILES {
                self.overwrite.expect_free(&output.join(file))?;
            }
        }
        let (config, _, data) = self.images.open(&trained, &self.data)?;
        // Whatever classes they have, or none.
        let unconditional = ModelConfig {
            nr_classes: 0,
            ..model.clone()
        };
        expect_images(&unconditional, &data)?;
        note_dropped(data.dropped());
        if team.leads() {
            trained.note_sizes(&data);
        }
        let (names, comparable) = class_names(&trained, &config, &data);
        if team.leads() {
            if !comparable && data.nr_classes() > 0 {
                note(format_args!(
                    "{}: other classes than the model's: how many are right can't be told",
                    data.describe()
                ));
            }
            catch_interrupts("leaving after this batch")?;
            make_folder(&output)?;
        }
        Ok(Prepared {
            batch_size: self.images.batch_size(&device),
            device,
            trained,
            network,
            data,
            names,
            comparable,
            output,
        })
    }

    /// How many were right; where nobody knows, the classes of the first images.
    fn summary(
        &self,
        trained: &Trained,
        found: &Classification,
        names: &[String],
        data: &Dataset,
    ) -> String {
        let weights = format!(
            "({} weights, step {})",
            trained.kind(self.images.raw),
            trained.step()
        );
        let images = counted(found.len(), "image");
        if let Some(accuracy) = found.accuracy() {
            let deviation = (accuracy * (1.0 - accuracy) / found.len() as f64).sqrt();
            return format!(
                "{images}: {:.2} ± {:.2} % are of the class found {weights}",
                100.0 * accuracy,
                100.0 * deviation
            );
        }
        let classes = found.classes();
        let first = classes
            .iter()
            .take(NAMED)
            .enumerate()
            .map(|(image, &class)| {
                let name = data.image_name(image);
                let image = name.map_or_else(|| image.to_string(), str::to_owned);
                format!("{image}: {}", names[class as usize])
            });
        let more = if classes.len() > NAMED { ", ..." } else { "" };
        let first: Vec<String> = first.collect();
        format!("{images} classified {weights}: {}{more}", first.join(", "))
    }
}

/// The names of the model's classes, their numbers where nothing tells them, and whether the classes of
/// `data` are those.
fn class_names(trained: &Trained, config: &DataConfig, data: &Dataset) -> (Vec<String>, bool) {
    let model = trained.model();
    let own = match trained.is_own(config) && trained.known_class_names().is_empty() {
        true => data.class_names().to_vec(),
        false => trained.class_names().unwrap_or_else(|error| {
            note(format_args!(
                "classes have numbers instead of names: {error}"
            ));
            Vec::new()
        }),
    };
    let theirs = data.class_names();
    let as_many = data.nr_classes() > 0 && expect_images(model, data).is_ok();
    let comparable = as_many && (own.is_empty() || theirs.is_empty() || own == theirs);
    let names = if own.is_empty() { theirs.to_vec() } else { own };
    let numbers = || {
        (0..model.nr_classes)
            .map(|class| class.to_string())
            .collect()
    };
    let named = names.len() == model.nr_classes;
    (if named { names } else { numbers() }, comparable)
}

/// A line for each image: number, own class (-1 without), name, the likeliest class and the probability
/// of each.
fn probabilities_of(
    found: &Classification,
    names: &[String],
    data: &Dataset,
) -> io::Result<Vec<u8>> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let columns = ["index", "label", "name", "class"].map(str::to_owned);
    table.write_record(columns.iter().chain(names))?;
    let (classes, probabilities) = (found.classes(), found.probabilities());
    let images = classes.iter().zip(probabilities.chunks_exact(names.len()));
    for (image, (&class, probabilities)) in images.enumerate() {
        let label = found.labels.get(image);
        let label = label.map_or_else(|| "-1".into(), u32::to_string);
        let name = data.image_name(image).unwrap_or_default().to_owned();
        let first = [
            image.to_string(),
            label,
            name,
            names[class as usize].clone(),
        ];
        let probabilities = probabilities.iter().map(f64::to_string);
        table.write_record(first.into_iter().chain(probabilities))?;
    }
    table.into_inner().map_err(|error| error.into_error())
}

/// A line for each class: how many of its images were found to be of each.
fn confusion_of(counts: &[usize], names: &[String]) -> io::Result<Vec<u8>> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let corner = "class".to_owned();
    table.write_record([&corner].into_iter().chain(names))?;
    for (name, counts) in names.iter().zip(counts.chunks_exact(names.len())) {
        let counts = counts.iter().map(usize::to_string);
        table.write_record([name.clone()].into_iter().chain(counts))?;
    }
    table.into_inner().map_err(|error| error.into_error())
}

fn write_table(path: &Path, table: Vec<u8>) -> Result {
    let written = atomic::write(path, |w| w.write_all(&table));
    Ok(written.map_err(|error| format!("cannot write `{}`: {error}", path.display()))?)
}
