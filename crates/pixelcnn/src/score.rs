//! How unusual images are: their likelihood, and their likelihood corrected by how complex they
//! are.
//!
//! The likelihood alone misleads: a model spends few bits on simple images, even on those unlike any
//! that it was trained on. Serrà et al. (2020, "Input complexity and out-of-distribution detection
//! with likelihood-based generative models", section 4) take off what a lossless codec spends on the
//! image: S(x) = -log p(x) - L(x), the bits by which the model does worse than a codec that knows
//! nothing of the data.

use std::fmt;
use std::ops::{ControlFlow, Range};

use pixelcnn_core::incremental::EvaluatorError;
use pixelcnn_core::{Stopped, go_on};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use zune_core::bit_depth::BitDepth;
use zune_core::colorspace::ColorSpace;
use zune_core::options::EncoderOptions;
use zune_jpegxl::JxlSimpleEncoder;

use crate::data::{DataError, Dataset};
use crate::evaluate::{EvaluateError, Evaluation, in_batches};
use crate::network::{EngineError, Network};

/// Why there are no scores.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// Images can't be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Images are not what the network takes.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model is one of codes.
    #[error(transparent)]
    Evaluator(#[from] EvaluatorError),
    /// An encoder fails.
    #[error(
        "an image of {shape:?} (height, width, channels) cannot be encoded as {format}: {reason}"
    )]
    Encode {
        /// The format.
        format: LosslessFormat,
        /// The image's height, width and channels.
        shape: [usize; 3],
        /// What the encoder says.
        reason: String,
    },
    /// `progress` said so.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// A file format that loses nothing: the size of its file says how complex an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LosslessFormat {
    /// With the filter chosen for each row.
    Png,
    /// Smaller on photographs, where its longer header does not weigh.
    JpegXl,
}

impl fmt::Display for LosslessFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LosslessFormat::Png => "PNG",
            LosslessFormat::JpegXl => "JPEG XL",
        })
    }
}

impl LosslessFormat {
    /// All there are.
    pub const ALL: [LosslessFormat; 2] = [LosslessFormat::Png, LosslessFormat::JpegXl];

    /// The file of an `image` of `shape` \[H, W, channels\], 1 or 3 channels.
    ///
    /// # Errors
    /// [`ScoreError::Encode`], as where the shape is another.
    pub fn encode(self, image: &[u8], shape: [usize; 3]) -> Result<Vec<u8>, ScoreError> {
        let file = match self {
            LosslessFormat::Png => encode_png(image, shape),
            LosslessFormat::JpegXl => encode_jpeg_xl(image, shape),
        };
        file.map_err(|reason| ScoreError::Encode {
            format: self,
            shape,
            reason,
        })
    }
}

impl LosslessFormat {
    /// Bits/dim of the file of an `image`, everything in it counted.
    ///
    /// # Errors
    /// As [`LosslessFormat::encode`].
    pub fn bits_per_dim(self, image: &[u8], shape: [usize; 3]) -> Result<f64, ScoreError> {
        let file = self.encode(image, shape)?;
        Ok(8.0 * file.len() as f64 / image.len() as f64)
    }
}

fn encode_png(image: &[u8], [height, width, channels]: [usize; 3]) -> Result<Vec<u8>, String> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width as u32, height as u32);
    encoder.set_color(match channels {
        1 => png::ColorType::Grayscale,
        _ => png::ColorType::Rgb,
    });
    encoder.set_compression(png::Compression::High);
    encoder.set_filter(png::Filter::Adaptive);
    encoder
        .write_header()
        .and_then(|mut writer| {
            writer.write_image_data(image)?;
            writer.finish()
        })
        .map_err(|error| error.to_string())?;
    Ok(file)
}

/// Of a single row or column, which the encoder does not take, there are two.
fn encode_jpeg_xl(image: &[u8], [height, width, channels]: [usize; 3]) -> Result<Vec<u8>, String> {
    if height == 1 {
        return encode_jpeg_xl(&[image, image].concat(), [2, width, channels]);
    }
    if width == 1 {
        let pixels = image.chunks_exact(channels);
        let twice: Vec<u8> = pixels.flat_map(|pixel| [pixel, pixel].concat()).collect();
        return encode_jpeg_xl(&twice, [height, 2, channels]);
    }
    const MOST: u8 = 127;
    let colours = match channels {
        1 => ColorSpace::Luma,
        _ => ColorSpace::RGB,
    };
    let options = EncoderOptions::new(width, height, colours, BitDepth::Eight);
    let mut file = Vec::new();
    JxlSimpleEncoder::new(image, options.set_effort(MOST).set_num_threads(1))
        .encode(&mut file)
        .map_err(|error| format!("{error:?}"))?;
    Ok(file)
}

/// What a model and the formats spend on images.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Scores {
    /// The model's likelihood of each image.
    pub likelihood: Evaluation,
    /// Bits/dim of each image's file, everything in it counted, under each of [`LosslessFormat::ALL`].
    pub complexity: [Vec<f64>; LosslessFormat::ALL.len()],
}

impl Scores {
    /// Those of several sets of images, one after the other, as of one.
    pub fn concat(parts: Vec<Scores>) -> Scores {
        let mut whole = Scores::default();
        let mut likelihoods = Vec::new();
        for part in parts {
            likelihoods.push(part.likelihood);
            for (whole, part) in whole.complexity.iter_mut().zip(part.complexity) {
                whole.extend(part);
            }
        }
        whole.likelihood = Evaluation::concat(likelihoods);
        whole
    }

    /// Bits/dim of each image's file in a format \[N\].
    pub fn complexity(&self, format: LosslessFormat) -> &[f64] {
        &self.complexity[format as usize]
    }

    /// For each image \[N\], the model's bits/dim less those of the smallest file that one of
    /// `formats` makes of it: S(x), above. Higher is more unusual. Without formats it is the model's bits/dim.
    pub fn corrected(&self, formats: &[LosslessFormat]) -> Vec<f64> {
        let smallest = |image: usize| {
            let sizes = formats.iter().map(|&format| self.complexity(format)[image]);
            sizes.reduce(f64::min).unwrap_or(0.0)
        };
        let bits = self.likelihood.bits_per_dim.iter().enumerate();
        bits.map(|(image, bits)| bits - smallest(image)).collect()
    }
}

/// Scores some images of a data set that follow one another, `batch_size` at a time. `progress` sees
/// the scores so far after every batch and can stop it.
///
/// # Errors
/// Where images can't be read or encoded, or are not what the network takes, or stopped.
pub fn score(
    network: &mut Network,
    data: &Dataset,
    images: Range<usize>,
    batch_size: usize,
    progress: &mut dyn FnMut(&Scores) -> ControlFlow<()>,
) -> Result<Scores, ScoreError> {
    EvaluatorError::unless_likelihood_of_images(network.config())?;
    let mut scores = Scores::default();
    let order = in_batches(network, data, images, batch_size, |network, batch| {
        let config = network.config();
        let (shape, dims) = (
            [config.height, config.width, config.channels],
            config.dims(),
        );
        scores.likelihood.add(network, batch)?;
        for format in LosslessFormat::ALL {
            let images = batch.images.par_chunks_exact(dims);
            let bits = images.map(|image| format.bits_per_dim(image, shape));
            let bits = bits.collect::<Result<Vec<f64>, ScoreError>>()?;
            scores.complexity[format as usize].extend(bits);
        }
        Ok::<_, ScoreError>(go_on(progress(&scores))?)
    })?;
    scores.likelihood.put_in(&order);
    for complexity in &mut scores.complexity {
        order.put(1, complexity);
    }
    Ok(scores)
}

/// An image, and where in it the bits are spent.
#[derive(Debug, Clone, PartialEq)]
pub struct Map {
    /// Height and width.
    pub size: [usize; 2],
    /// \[H, W, channels\].
    pub image: Vec<u8>,
    /// Bits of each pixel \[H, W\], all its channels together, given the pixels before it.
    pub bits_per_pixel: Vec<f32>,
}

/// The images at `indices` with their bits per pixel, `batch_size` evaluated at a time.
///
/// # Errors
/// Where images can't be read or are not what the network takes.
pub fn maps(
    network: &mut Network,
    data: &Dataset,
    indices: &[usize],
    batch_size: usize,
) -> Result<Vec<Map>, EvaluateError> {
    EvaluatorError::unless_likelihood_of_images(network.config())?;
    let (mut maps, indices) = (Vec::new(), indices.iter().copied());
    let order = in_batches(network, data, indices, batch_size, |network, batch| {
        let config = network.config();
        let nats = network.nats_per_pixel(batch)?;
        let images = batch.images.chunks_exact(config.dims());
        let pixels = nats.chunks_exact(config.height * config.width);
        maps.extend(images.zip(pixels).map(|(image, nats)| {
            Map {
                size: [config.height, config.width],
                image: image.to_vec(),
                bits_per_pixel: nats
                    .iter()
                    .map(|nats| nats / std::f32::consts::LN_2)
                    .collect(),
            }
        }));
        Ok::<_, EvaluateError>(())
    })?;
    order.put(1, &mut maps);
    Ok(maps)
}

/// How images that a model should find usual score: what the scores of others are seen beside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// The images.
    pub images: String,
    /// How many there are.
    pub count: usize,
    /// Of the model's bits/dim the quantiles from 0 to 1, at equal distances.
    pub bits_per_dim: Vec<f64>,
    /// The same of the scores that are corrected by the smallest file.
    pub corrected: Vec<f64>,
}

impl Reference {
    /// Distances between the quantiles.
    const STEPS: usize = 200;

    /// What scores of some images are seen beside from now on; none where there are no images.
    pub fn new(images: String, scores: &Scores) -> Option<Reference> {
        let bits_per_dim = &scores.likelihood.bits_per_dim;
        let quantiles = |mut values: Vec<f64>| -> Option<Vec<f64>> {
            values.sort_by(f64::total_cmp);
            let last = values.len().checked_sub(1)?;
            let steps = 0..=Reference::STEPS;
            Some(
                steps
                    .map(|i| values[(last * i).div_ceil(Reference::STEPS)])
                    .collect(),
            )
        };
        Some(Reference {
            images,
            count: bits_per_dim.len(),
            bits_per_dim: quantiles(bits_per_dim.clone())?,
            corrected: quantiles(scores.corrected(&LosslessFormat::ALL))?,
        })
    }
}

/// The area under the receiver operating characteristic: how often a score drawn from `unusual` is
/// above one drawn from `usual`, equal ones counted half. 0.5 where the scores can't tell the sets
/// apart, NaN where one is empty.
///
/// It is the rank sum of Wilcoxon, Mann and Whitney: ties share the mean of their ranks.
pub fn auroc(usual: &[f64], unusual: &[f64]) -> f64 {
    let of = |scores: &[f64], is_unusual| -> Vec<(f64, bool)> {
        scores.iter().map(|&score| (score, is_unusual)).collect()
    };
    let mut scores = [of(usual, false), of(unusual, true)].concat();
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut rank_sum, mut below) = (0.0, 0);
    for ties in scores.chunk_by(|a, b| a.0 == b.0) {
        let mean_rank = below as f64 + (ties.len() + 1) as f64 / 2.0;
        rank_sum += mean_rank * ties.iter().filter(|(_, is_unusual)| *is_unusual).count() as f64;
        below += ties.len();
    }
    let (m, n) = (usual.len() as f64, unusual.len() as f64);
    (rank_sum - n * (n + 1.0) / 2.0) / (m * n)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;
    use crate::ModelConfig;
    use crate::data::{DataConfig, Split};
    use crate::evaluate::evaluate;
    use crate::network::{Batch, draw_parameters};

    fn noise(len: usize) -> Vec<u8> {
        let random = std::iter::successors(Some(7u32), |random| {
            Some(random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223))
        });
        random
            .map(|random| (random >> 24) as u8)
            .skip(1)
            .take(len)
            .collect()
    }

    #[test]
    fn png_files_hold_the_image() {
        for shape in [[8, 12, 3], [12, 4, 1]] {
            let image = noise(shape.iter().product());
            let file = LosslessFormat::Png.encode(&image, shape).unwrap();
            let mut decoder = png::Decoder::new(Cursor::new(&file)).read_info().unwrap();
            let mut decoded = vec![0; decoder.output_buffer_size().unwrap()];
            decoder.next_frame(&mut decoded).unwrap();
            assert_eq!(decoded, image);
            assert_eq!(decoder.info().size(), (shape[1] as u32, shape[0] as u32));
        }
    }

    #[test]
    fn files_grow_with_complexity() {
        for format in LosslessFormat::ALL {
            for shape in [
                [32, 32, 3],
                [64, 32, 1],
                [4, 4, 3],
                [1, 40, 3],
                [50, 1, 1],
                [1, 1, 3],
            ] {
                let dims = shape.iter().product();
                let size = |image: &[u8]| format.encode(image, shape).unwrap().len();
                let (flat, noise) = (size(&vec![200; dims]), size(&noise(dims)));
                assert!(noise >= dims, "{format} {shape:?}: {noise}");
                assert!(flat < 250, "{format} {shape:?}: {flat}");
            }
            assert!(format.encode(&[1, 2, 3], [4, 4, 3]).is_err());
        }
        // The better format is better where there is something to predict.
        let smooth: Vec<u8> = (0..64 * 64 * 3)
            .zip(noise(64 * 64 * 3))
            .map(|(i, noise)| (i / 3 % 64 + i / 192 + usize::from(noise % 8)) as u8)
            .collect();
        let size = |format: LosslessFormat| format.encode(&smooth, [64, 64, 3]).unwrap().len();
        assert!(size(LosslessFormat::JpegXl) < size(LosslessFormat::Png));
    }

    proptest! {
        #[test]
        fn auroc_counts_pairs(
            usual in prop::collection::vec(-3i8..4, 1..20),
            unusual in prop::collection::vec(-3i8..4, 1..20),
        ) {
            let [usual, unusual] = [usual, unusual]
                .map(|scores| scores.into_iter().map(|score| f64::from(score) / 2.0).collect::<Vec<_>>());
            let pairs = unusual.iter().flat_map(|a| usual.iter().map(move |b| (a, b)));
            let wins = pairs.map(|(a, b)| match a.total_cmp(b) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            });
            let expected = wins.sum::<f64>() / (usual.len() * unusual.len()) as f64;
            prop_assert!((auroc(&usual, &unusual) - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn the_two_zeros_are_one_score() {
        assert_eq!(auroc(&[0.0, -0.0], &[-0.0, 0.0]), 0.5);
        assert_eq!(auroc(&[1.0, 2.0], &[3.0]), 1.0);
        assert!(auroc(&[], &[3.0]).is_nan());
    }

    #[test]
    fn the_smallest_file_corrects() {
        let scores = Scores {
            likelihood: Evaluation {
                bits_per_dim: vec![3.0, 4.0],
                labels: vec![],
            },
            complexity: [vec![2.0, 5.0], vec![2.5, 4.5]],
        };
        assert_eq!(scores.corrected(&[]), [3.0, 4.0]);
        assert_eq!(scores.corrected(&[LosslessFormat::Png]), [1.0, -1.0]);
        assert_eq!(scores.corrected(&[LosslessFormat::JpegXl]), [0.5, -0.5]);
        assert_eq!(scores.corrected(&LosslessFormat::ALL), [1.0, -0.5]);
    }

    #[test]
    fn a_reference_has_quantiles() {
        let bits: Vec<f64> = (0..1001).map(|i| f64::from((i * 8) % 1001)).collect();
        let scores = Scores {
            complexity: [vec![500.0; 1001], vec![600.0; 1001]],
            likelihood: Evaluation {
                bits_per_dim: bits,
                labels: vec![],
            },
        };
        let reference = Reference::new("these".into(), &scores).unwrap();
        assert_eq!((reference.count, reference.bits_per_dim.len()), (1001, 201));
        for (i, value) in reference.bits_per_dim.iter().enumerate() {
            assert_eq!(
                (*value, reference.corrected[i]),
                (5.0 * i as f64, 5.0 * i as f64 - 500.0)
            );
        }
        assert!(Reference::new("none".into(), &Scores::default()).is_none());
    }

    /// On real images: scores are what the likelihood and the formats give, and the maps' bits are
    /// where the likelihood's are.
    #[test]
    fn data_sets_are_scored() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cifar10-sample.npz");
        let data = DataConfig {
            data: path.into(),
            ..DataConfig::default()
        };
        let data = Dataset::open(&data, Split::Test).unwrap();
        let config = ModelConfig {
            height: data.height(),
            width: data.width(),
            nr_resnet: 1,
            nr_filters: 3,
            nr_logistic_mix: 2,
            ..ModelConfig::default()
        };
        let parameters = draw_parameters(&config, 1);
        let device = crate::device::parse("cpu").unwrap();
        let mut network = Network::new(&config, &parameters, &device).unwrap();
        let count = data.len().min(7);
        let mut seen = 0;
        let scores = score(&mut network, &data, 0..count, 3, &mut |scores| {
            seen += 1;
            assert_eq!(scores.complexity[1].len(), count.min(3 * seen));
            ControlFlow::Continue(())
        });
        let scores = scores.unwrap();
        let mut go_on = |_: &Evaluation| ControlFlow::Continue(());
        let evaluation = evaluate(&mut network, &data, 0..count, 4, &mut go_on).unwrap();
        assert_eq!(scores.likelihood, evaluation);

        let indices = [count - 1, 0];
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        data.read(&indices, &mut images, &mut labels).unwrap();
        let maps = maps(&mut network, &data, &indices, 1).unwrap();
        for ((&index, image), map) in indices.iter().zip(images.chunks(config.dims())).zip(&maps) {
            assert_eq!(map.image, image);
            let bits: f64 = map.bits_per_pixel.iter().map(|&bits| f64::from(bits)).sum();
            let bits = bits / config.dims() as f64;
            assert!((bits / scores.likelihood.bits_per_dim[index] - 1.0).abs() < 1e-5);
            let shape = [config.height, config.width, 3];
            let size = LosslessFormat::Png.encode(image, shape).unwrap().len();
            let expected = 8.0 * size as f64 / config.dims() as f64;
            assert_eq!(scores.complexity(LosslessFormat::Png)[index], expected);
        }

        // A pixel's bits hang on it and on those before it.
        let nats = |images: &[u8]| {
            network
                .nats_per_pixel(Batch {
                    images,
                    labels: &labels,
                    ..Batch::default()
                })
                .unwrap()
        };
        let before = nats(&images);
        let pixel = 5 * config.width + 3;
        let level = &mut images[config.dims() + 3 * pixel];
        *level = 255 - *level;
        let after = nats(&images);
        let pixel = config.height * config.width + pixel;
        assert_eq!(before[..pixel], after[..pixel]);
        assert_ne!(before[pixel], after[pixel]);

        let stopped = score(&mut network, &data, 0..count, 3, &mut |_| {
            ControlFlow::Break(())
        });
        assert!(matches!(stopped, Err(ScoreError::Stopped(_))));
    }
}
