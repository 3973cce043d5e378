//! What a model expects of each pixel.

use numpy::PyArrayDyn;
use pixelcnn::ModelConfig;
use pixelcnn::likelihood::{ChannelMixture, Mixture, from_level};
use pyo3::prelude::*;

use crate::arrays::array;
use crate::errors::value;

/// The distribution of every channel of every pixel, given all pixels before it and its own lower channels: a
/// mixture of logistics, of which each level from 0 to 255 has the part within half a level of it (the lowest
/// and the highest also what lies beyond).
#[pyclass(frozen, module = "pixelcnn")]
pub struct Distribution {
    /// N, H, W, C, components.
    shape: [usize; 5],
    channels: Vec<ChannelMixture>,
    /// How much each component weighs, float32 [N, H, W, C, components]; those of a channel add up to 1.
    #[pyo3(get)]
    weights: Py<PyArrayDyn<f32>>,
    /// The mean of each logistic, in levels, float32 [N, H, W, C, components].
    #[pyo3(get)]
    means: Py<PyArrayDyn<f32>>,
    /// The scale of each logistic, in levels, float32 [N, H, W, C, components].
    #[pyo3(get)]
    scales: Py<PyArrayDyn<f32>>,
}

/// Of each channel of each pixel its mixture, given the levels and what the network says of them.
pub fn mixtures(config: &ModelConfig, levels: &[u8], logits: &[f32]) -> Vec<ChannelMixture> {
    let mixture = Mixture::of(config);
    let mut found = Vec::with_capacity(levels.len());
    let pixels = levels.chunks_exact(config.channels);
    for (pixel, logits) in pixels.zip(logits.chunks_exact(mixture.logits_per_pixel())) {
        let known: Vec<f32> = pixel.iter().map(|&level| from_level(level)).collect();
        let mut one = ChannelMixture::default();
        for channel in 0..config.channels {
            mixture.next_channel(logits, &known[..channel], &mut one);
            found.push(one.clone());
        }
    }
    found
}

impl Distribution {
    /// Of all channels of some images, \[N, H, W, C\].
    pub fn new(
        py: Python<'_>,
        [count, height, width, channels]: [usize; 4],
        mixtures: Vec<ChannelMixture>,
    ) -> PyResult<Distribution> {
        const LEVELS: f32 = 127.5;
        let components = mixtures.first().map_or(0, |one| one.means.len());
        let shape = [count, height, width, channels, components];
        let weights = mixtures.iter().flat_map(|one| {
            let weights: Vec<f32> = one.log_weights.iter().map(|weight| weight.exp()).collect();
            let sum: f32 = weights.iter().sum();
            weights.into_iter().map(move |weight| weight / sum)
        });
        let means = mixtures.iter().flat_map(|one| &one.means);
        let scales = mixtures.iter().flat_map(|one| &one.log_scales);
        Ok(Distribution {
            weights: array(py, weights.collect(), &shape)?.unbind(),
            means: array(
                py,
                means.map(|mean| (mean + 1.0) * LEVELS).collect(),
                &shape,
            )?
            .unbind(),
            scales: array(
                py,
                scales.map(|scale| scale.exp() * LEVELS).collect(),
                &shape,
            )?
            .unbind(),
            shape,
            channels: mixtures,
        })
    }
}

#[pymethods]
impl Distribution {
    /// The probability of each level of a pixel's channels: float64 [C, 256].
    ///
    /// Parameters
    /// ----------
    /// image, row, column : int
    ///     Which pixel.
    fn probabilities<'py>(
        &self,
        py: Python<'py>,
        image: usize,
        row: usize,
        column: usize,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let [count, height, width, channels, _] = self.shape;
        if image >= count || row >= height || column >= width {
            return Err(value(format!(
                "image {image}, row {row}, column {column}: there are {count} of {height} x {width}"
            )));
        }
        let first = ((image * height + row) * width + column) * channels;
        let levels = self.channels[first..first + channels]
            .iter()
            .flat_map(|one| {
                (0..=255).map(|level| f64::from(one.log_prob(from_level(level))).exp())
            });
        array(py, levels.collect(), &[channels, 256])
    }

    fn __repr__(&self) -> String {
        let [count, height, width, channels, components] = self.shape;
        format!(
            "Distribution of {count} images {height}x{width}x{channels}, {components} components"
        )
    }
}
