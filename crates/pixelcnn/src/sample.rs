//! Images drawn from a model, pixel by pixel (paper, section 2.1).

use std::ops::{ControlFlow, Range};

use pixelcnn_core::incremental::gpu::{GpuEvaluator, GpuRaster};
use pixelcnn_core::incremental::{Evaluator, EvaluatorError, Raster};
use pixelcnn_core::likelihood::{EnergyDistance, Likelihood, Mixture, NOISE, from_level, to_level};
use pixelcnn_core::{ModelConfig, Stopped, go_on};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

#[cfg(feature = "cuda")]
use crate::device;
use crate::device::Device;
use crate::network::EngineError;
use crate::random::{Purpose, generator};

/// The original keeps its uniforms this far from 0 and 1, where the logistic is infinite.
const MARGIN: f32 = 1e-5;

/// Images that are drawn side by side on a CPU: enough that more would not be faster.
const SIDE_BY_SIDE: usize = 64;
/// Memory that they take together, unless one alone takes more.
const MAX_BYTES: usize = 1 << 30;
/// Images that are drawn side by side on a GPU, where there is memory for as many.
const SIDE_BY_SIDE_ON_A_GPU: usize = 1024;

/// A model ready to draw images pixel by pixel, on a device. Clones share its weights.
#[derive(Clone)]
pub struct Sampler(On);

#[derive(Clone)]
enum On {
    Cpu(Evaluator),
    Gpu(GpuEvaluator),
}

impl From<Evaluator> for Sampler {
    /// On the CPU.
    fn from(evaluator: Evaluator) -> Sampler {
        Sampler(On::Cpu(evaluator))
    }
}

impl From<GpuEvaluator> for Sampler {
    /// On a GPU.
    fn from(evaluator: GpuEvaluator) -> Sampler {
        Sampler(On::Gpu(evaluator))
    }
}

impl Sampler {
    /// The model of `parameters`, in the layout's order, on the device.
    ///
    /// # Errors
    /// Where the configuration or the parameters are not a model's, or the device refuses.
    pub fn new(
        config: &ModelConfig,
        parameters: &[Vec<f32>],
        device: &Device,
    ) -> Result<Sampler, DrawError> {
        match device {
            Device::Cpu { .. } => Ok(Evaluator::new(config, parameters)?.into()),
            #[cfg(feature = "cuda")]
            Device::Cuda { number, .. } => {
                let cache = device::cuda_cache();
                let cache = cache.as_deref();
                Ok(pixelcnn_cuda::evaluator(config, parameters, *number, cache)?.into())
            }
            #[cfg(feature = "wgpu")]
            Device::Wgpu { number } => {
                Ok(pixelcnn_wgpu::evaluator(config, parameters, *number)?.into())
            }
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        match &self.0 {
            On::Cpu(evaluator) => evaluator.config(),
            On::Gpu(evaluator) => evaluator.config(),
        }
    }

    /// What makes samples of the output, of a model that is trained by the energy distance.
    fn head(&self) -> Option<&EnergyDistance> {
        match &self.0 {
            On::Cpu(evaluator) => evaluator.head(),
            On::Gpu(evaluator) => evaluator.head(),
        }
    }

    /// How many images are drawn side by side: on a CPU up to 64, in a gigabyte of memory if one needs no more.
    ///
    /// # Errors
    /// Where the device does not tell.
    pub fn side_by_side(&self) -> Result<usize, DrawError> {
        match &self.0 {
            On::Cpu(evaluator) => Ok(side_by_side(evaluator, SIDE_BY_SIDE)),
            On::Gpu(evaluator) => Ok(evaluator.room()?.clamp(1, SIDE_BY_SIDE_ON_A_GPU)),
        }
    }

    fn begin(&self, labels: &[u32]) -> Result<PixelByPixel, DrawError> {
        match &self.0 {
            On::Cpu(evaluator) => {
                let threads = useful_threads(evaluator, labels.len());
                Ok(PixelByPixel::Cpu(evaluator.begin(labels, threads)?.into()))
            }
            On::Gpu(evaluator) => Ok(PixelByPixel::Gpu(evaluator.begin(labels)?.into())),
        }
    }
}

/// Images on their way, all at the same pixel.
enum PixelByPixel {
    Cpu(Box<Raster>),
    Gpu(Box<GpuRaster>),
}

impl PixelByPixel {
    /// Gives a model the coarser maps of the images that it wants.
    fn give_coarse(&mut self, images: &[u8]) -> Result<(), DrawError> {
        match self {
            PixelByPixel::Cpu(raster) => raster.give_coarse(images)?,
            PixelByPixel::Gpu(raster) => raster.give_coarse(images)?,
        }
        Ok(())
    }

    fn position(&self) -> Option<[usize; 2]> {
        match self {
            PixelByPixel::Cpu(raster) => raster.position(),
            PixelByPixel::Gpu(raster) => raster.position(),
        }
    }

    fn logits(&mut self) -> Result<&[f32], DrawError> {
        match self {
            PixelByPixel::Cpu(raster) => Ok(raster.logits()),
            PixelByPixel::Gpu(raster) => Ok(raster.logits()?),
        }
    }

    fn push(&mut self, levels: &[u8]) -> Result<(), DrawError> {
        match self {
            PixelByPixel::Cpu(raster) => raster.push(levels),
            PixelByPixel::Gpu(raster) => raster.push(levels)?,
        }
        Ok(())
    }
}

/// What is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Class of every image; any value for an unconditional model. Their number is the number of
    /// images.
    pub labels: Vec<u32>,
    /// 1 draws from the model; less than 1 draws likelier, more uniform images.
    pub temperature: f32,
    /// Image `i` is a function of the seed and `i`, whatever is drawn beside it.
    pub seed: u64,
    /// Of a model of codes that is given coarser maps, those of all images: codes as the model takes them
    /// ([`ModelConfig::bytes_per_image`]), of which the images' own are not looked at. Else empty.
    pub coarse: Vec<u8>,
}

impl Sampling {
    /// The image with this number; [`Rows`] draws several, of different samplings too, side by side.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn image<'a>(&'a self, config: &ModelConfig, number: usize) -> Wanted<'a> {
        let size = config.bytes_per_image();
        Wanted {
            class: self.labels[number],
            temperature: self.temperature,
            random: generator(self.seed, Purpose::Sample, number as u64),
            given: self.coarse.get(number * size..(number + 1) * size),
            known: &[],
        }
    }

    /// `count` images from the model itself; of a class-conditional model all of class 0.
    pub fn of(count: usize, seed: u64) -> Sampling {
        Sampling {
            labels: vec![0; count],
            temperature: 1.0,
            seed,
            coarse: Vec::new(),
        }
    }
}

/// How far images have come.
#[derive(Debug, Clone, Copy)]
pub struct Drawn<'a> {
    /// Pixels of all images that are done.
    pub done: usize,
    /// Pixels of all images.
    pub total: usize,
    /// The images u8 \[N, H, W, C\]; what is not done is 0.
    pub images: &'a [u8],
}

/// Why images are not drawn.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DrawError {
    /// A class that the model does not have, or no memory.
    #[error(transparent)]
    Evaluator(#[from] EvaluatorError),
    /// The device refuses.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model is given coarser maps, and there is not one for each image.
    #[error("the model is given a coarser map for each image: there are not as many")]
    Coarse,
    /// `progress` said so.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Draws those of a sampling's images that have these numbers, u8 \[N, H, W, C\], or codes in the bytes
/// that the model takes. On the CPU, up to 64
/// at a time and in a gigabyte of memory if one image needs no more, on as many threads as rayon has or
/// one where little work is to be shared; on a GPU up to 1,024. There a pixel may differ from the CPU's,
/// whose arithmetic rounds otherwise.
/// `progress` is told after every row and can stop it.
///
/// # Errors
/// A class that the model does not have, no memory, a device that refuses, or stopped.
pub fn sample(
    sampler: &Sampler,
    sampling: &Sampling,
    images: Range<usize>,
    progress: &mut dyn FnMut(Drawn) -> ControlFlow<()>,
) -> Result<Vec<u8>, DrawError> {
    let (first, config) = (images.start, sampler.config());
    draw(sampler, images.len(), progress, |drawn| {
        let drawn = first + drawn.start..first + drawn.end;
        Rows::new(sampler, drawn.map(|i| sampling.image(config, i)))
    })
}

/// How many images to take side by side where up to `wanted` are: as many, or those that fit into a
/// gigabyte, or one.
pub(crate) fn side_by_side(evaluator: &Evaluator, wanted: usize) -> usize {
    (MAX_BYTES / evaluator.bytes_per_image()).clamp(1, wanted.max(1))
}

/// Draws images a few at a time, the rows of which `rows` gives.
pub(crate) fn draw(
    sampler: &Sampler,
    count: usize,
    progress: &mut dyn FnMut(Drawn) -> ControlFlow<()>,
    rows: impl Fn(Range<usize>) -> Result<Rows, DrawError>,
) -> Result<Vec<u8>, DrawError> {
    let config = sampler.config();
    let (height, width, dims) = (config.height, config.width, config.bytes_per_image());
    let most = sampler.side_by_side()?;
    let mut images = vec![0; count * dims];
    for first in (0..count).step_by(most) {
        let range = first..count.min(first + most);
        let drawn = range.len();
        for (y, row) in rows(range)?.enumerate() {
            let row = row?;
            let size = width * config.bytes_per_pixel();
            let targets = images[first * dims..].chunks_exact_mut(dims);
            for (target, row) in targets.zip(row.chunks_exact(size)) {
                target[y * size..][..size].copy_from_slice(row);
            }
            let progressed = Drawn {
                done: (first * height + (y + 1) * drawn) * width,
                total: count * height * width,
                images: &images,
            };
            go_on(progress(progressed))?;
        }
    }
    Ok(images)
}

/// One of the images that are drawn side by side: [`Sampling::image`], or
/// [`Completion::variant`](crate::complete::Completion::variant).
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    pub(crate) class: u32,
    pub(crate) temperature: f32,
    pub(crate) random: ChaCha8Rng,
    /// What is given of the image \[H, W, C\], or codes as the model takes them.
    pub(crate) given: Option<&'a [u8]>,
    /// Which of its pixels are known \[H, W\]; none are where it is empty.
    pub(crate) known: &'a [bool],
}

/// Images being drawn side by side: an iterator over their finished rows, u8 \[images, W, C\]. After an
/// error there is nothing more.
pub struct Rows {
    raster: PixelByPixel,
    failed: bool,
    config: ModelConfig,
    likelihood: Likelihood,
    /// In place of the likelihood, of a model that is trained by the energy distance.
    head: Option<EnergyDistance>,
    images: Vec<Image>,
    row: usize,
}

impl Rows {
    /// Begins images that are drawn side by side, each as it would be alone.
    ///
    /// # Errors
    /// A class that the model does not have, not a coarser map for each image where it wants them, or no
    /// memory.
    ///
    /// # Panics
    /// If there are none, or one is of another model.
    pub fn new<'a>(
        sampler: &Sampler,
        images: impl IntoIterator<Item = Wanted<'a>>,
    ) -> Result<Rows, DrawError> {
        let config = sampler.config();
        let size = config.bytes_per_image();
        let (mut labels, mut coarse, mut begun) = (Vec::new(), Vec::new(), Vec::new());
        for image in images {
            let given = image.given.unwrap_or_default();
            assert!(
                given.is_empty() || given.len() == size,
                "an image of the model"
            );
            if config.nr_coarse_codes > 0 {
                if given.is_empty() {
                    return Err(DrawError::Coarse);
                }
                coarse.extend(given);
            }
            labels.push(image.class);
            begun.push(Image {
                temperature: image.temperature,
                given: given.to_vec(),
                known: image.known.to_vec(),
                pixel: Pixel::new(image.random),
            });
        }
        let mut raster = sampler.begin(&labels)?;
        if config.nr_coarse_codes > 0 {
            raster.give_coarse(&coarse)?;
        }
        Ok(Rows {
            raster,
            failed: false,
            config: config.clone(),
            likelihood: Likelihood::of(config),
            head: sampler.head().cloned(),
            images: begun,
            row: 0,
        })
    }
}

/// One thread where a layer of a pixel is so little work that threads would mostly wait for each
/// other, and on a busy machine for their turn; else as many as rayon has.
pub(crate) fn useful_threads(evaluator: &Evaluator, images: usize) -> usize {
    const MULTIPLY_ADDS: usize = 1 << 15;
    let layers = evaluator.weights_of([1, 1]).map(<[f32]>::len);
    let layers = layers.filter(|weights| *weights > 0);
    let (count, weights) = layers.fold((0, 0), |(count, sum), len| (count + 1, sum + len));
    match weights * images < count * MULTIPLY_ADDS {
        true => 1,
        false => rayon::current_num_threads(),
    }
}

impl Iterator for Rows {
    type Item = Result<Vec<u8>, DrawError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.raster.position().is_none() {
            return None;
        }
        let row = self.draw_row();
        self.failed = row.is_err();
        Some(row)
    }
}

impl Rows {
    fn draw_row(&mut self) -> Result<Vec<u8>, DrawError> {
        let (channels, together) = (self.config.channels, self.config.channels_together());
        let (width, bytes) = (self.config.width, self.config.bytes_per_pixel());
        let mut rows = vec![0; self.images.len() * width * bytes];
        let turns = (0..channels).step_by(together);
        let turns = (0..width).flat_map(|x| turns.clone().map(move |channel| (x, channel)));
        for (x, channel) in turns {
            let due = self.config.bytes_of(channel..channel + together);
            let mut drawn = vec![0; self.images.len() * due.len()];
            self.draw(channel, due.len(), &mut drawn)?;
            let place = self.row * width + x;
            for (image, drawn) in self
                .images
                .iter_mut()
                .zip(drawn.chunks_exact_mut(due.len()))
            {
                if image.known.get(place) == Some(&true) {
                    drawn.copy_from_slice(&image.given[place * bytes..][due.clone()]);
                }
                if together < channels {
                    // The next channels are predicted from levels.
                    image.pixel.values[channel] = from_level(drawn[0]).into();
                }
            }
            self.raster.push(&drawn)?;
            let rows = rows.chunks_exact_mut(width * bytes);
            let rows = rows.map(|row| &mut row[x * bytes..][..bytes]);
            let pixels = rows.zip(drawn.chunks_exact(due.len()));
            for (image, (pixel, drawn)) in self.images.iter().zip(pixels) {
                // Behind a code is that of the coarser map.
                if self.config.nr_coarse_codes > 0 {
                    pixel.copy_from_slice(&image.given[place * bytes..][..bytes]);
                }
                pixel[due.clone()].copy_from_slice(drawn);
            }
        }
        self.row += 1;
        Ok(rows)
    }

    /// Draws the channels of the pixel from one on whose turn it is, so many of each image, or its code in two
    /// bytes. Known pixels take their random numbers too: the others' do not hang on them.
    fn draw(&mut self, channel: usize, size: usize, drawn: &mut [u8]) -> Result<(), DrawError> {
        let logits = self.raster.logits()?;
        if let Some(head) = &self.head {
            let noise = self.images.iter_mut().flat_map(|image| {
                let (temperature, random) = (image.temperature, &mut image.pixel.random);
                [(); NOISE].map(|()| temperature * random.random_range(-1.0..1.0))
            });
            let values = head.draw(logits, noise.collect());
            for (level, value) in drawn.iter_mut().zip(values) {
                *level = to_level(value);
            }
            return Ok(());
        }
        let logits = logits.chunks_exact(self.config.output_channels());
        let images = self.images.iter_mut().zip(logits);
        for ((image, logits), drawn) in images.zip(drawn.chunks_exact_mut(size)) {
            let (temperature, pixel) = (image.temperature, &mut image.pixel);
            match self.likelihood {
                Likelihood::Mixture(mixture) => {
                    if channel == 0 {
                        pixel.begin(mixture, logits, temperature);
                    }
                    for level in drawn {
                        *level = pixel.draw(mixture, logits, temperature);
                    }
                }
                Likelihood::Categorical(codes) => {
                    let uniform = pixel.random.random_range(0.0..1.0);
                    let code = codes.draw(logits, uniform, temperature);
                    drawn.copy_from_slice(&code.to_le_bytes());
                }
            }
        }
        Ok(())
    }
}

/// An image that is being drawn.
struct Image {
    temperature: f32,
    /// What is given of it \[H, W, C\]; empty where nothing is.
    given: Vec<u8>,
    /// Which of its pixels are known \[H, W\]; none are where it is empty.
    known: Vec<bool>,
    pixel: Pixel,
}

/// An image's pixel that is being drawn.
struct Pixel {
    random: ChaCha8Rng,
    /// The random numbers of its logistics.
    uniforms: Vec<f32>,
    component: usize,
    /// Of the channels that are drawn.
    values: Vec<f64>,
}

impl Pixel {
    fn new(random: ChaCha8Rng) -> Pixel {
        Pixel {
            random,
            uniforms: Vec::new(),
            component: 0,
            values: Vec::new(),
        }
    }

    /// Draws the random numbers of the next pixel, and its component.
    fn begin(&mut self, mixture: Mixture, logits: &[f32], temperature: f32) {
        let mut uniforms = || self.random.random_range(MARGIN..1.0 - MARGIN);
        self.uniforms.resize(mixture.components, 0.0);
        self.uniforms.fill_with(&mut uniforms);
        self.component = mixture.component(logits, &self.uniforms, temperature);
        self.uniforms.resize(mixture.channels, 0.0);
        self.uniforms.fill_with(&mut uniforms);
        self.values.clear();
    }

    /// Draws the next channel's level.
    fn draw(&mut self, mixture: Mixture, logits: &[f32], temperature: f32) -> u8 {
        let u = self.uniforms[self.values.len()];
        let value = mixture.draw(logits, self.component, &self.values, u, temperature);
        self.values.push(value);
        to_level(value as f32)
    }
}

#[cfg(test)]
mod tests;
