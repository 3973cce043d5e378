//! Images of which a part is known, completed by a model.

use std::ops::ControlFlow;

use pixelcnn_core::ModelConfig;

use crate::network::EngineError;
use crate::random::{Purpose, generator};
use crate::sample::{DrawError, Drawn, Rows, Sampler, Wanted, draw};

/// What is completed.
///
/// A pixel is drawn given all pixels before it in raster order, known or drawn. Known pixels stay
/// as they are, but those after a missing one cannot tell it anything: the model looks only back.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Images u8 \[N, H, W, C\], or codes as the model takes them; what is not known in them is not looked at.
    pub images: Vec<u8>,
    /// Which pixels are known, in all of them alike \[H, W\].
    pub known: Vec<bool>,
    /// Class of every image; any value for an unconditional model.
    pub labels: Vec<u32>,
    /// How many times each image is completed.
    pub variants: usize,
    /// 1 draws from the model; less than 1 draws likelier, more uniform images.
    pub temperature: f32,
    /// Variant `k` of image `i` is a function of the seed, `i` and `k`.
    pub seed: u64,
}

impl Completion {
    /// A variant of an image; [`Rows`] draws several, of different completions too, side by side.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn variant<'a>(&'a self, config: &ModelConfig, image: usize, variant: usize) -> Wanted<'a> {
        let size = config.bytes_per_image();
        let index = (image as u64) << 32 | variant as u64;
        Wanted {
            class: self.labels[image],
            temperature: self.temperature,
            random: generator(self.seed, Purpose::Complete, index),
            given: Some(&self.images[image * size..(image + 1) * size]),
            known: &self.known,
        }
    }
}

/// Completes images: u8 \[N, variants, H, W, C\]. Memory, threads and `progress` are as for
/// [`sample`](crate::sample::sample).
///
/// # Errors
/// A class or a known code that the model does not have, no memory, or stopped.
///
/// # Panics
/// If the lengths disagree.
pub fn complete(
    sampler: &Sampler,
    completion: &Completion,
    progress: &mut dyn FnMut(Drawn) -> ControlFlow<()>,
) -> Result<Vec<u8>, DrawError> {
    let config = sampler.config();
    let (dims, variants) = (config.bytes_per_image(), completion.variants);
    let n = completion.labels.len();
    assert_eq!(completion.images.len(), n * dims, "a label for each image");
    assert_eq!(
        completion.known.len(),
        config.height * config.width,
        "every pixel known or not"
    );
    let pixels = completion.images.chunks_exact(config.bytes_per_pixel());
    let known = pixels.zip(completion.known.iter().cycle());
    let known = known.filter(|(_, known)| **known && config.nr_codes > 0);
    let mut codes_known = known.map(|(pixel, _)| ModelConfig::code(pixel, 0));
    let codes = config.nr_codes;
    if let Some(code) = codes_known.find(|code| *code >= codes) {
        return Err(EngineError::Code { code, codes }.into());
    }
    draw(sampler, n * variants, progress, |range| {
        let images = range.map(|i| completion.variant(config, i / variants, i % variants));
        Rows::new(sampler, images)
    })
}
