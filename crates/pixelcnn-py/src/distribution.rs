//! What a model expects of each pixel.

use numpy::{PyArrayDyn, PyArrayMethods, PyUntypedArrayMethods};
use pixelcnn::ModelConfig;
use pixelcnn::likelihood::{ChannelMixture, Mixture, from_level};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use crate::arrays::array;

/// The distribution of every channel of every pixel, given all pixels before it and its own lower channels: a
/// mixture of logistics, of which each level from 0 to 255 has the part within half a level of it (the lowest
/// and the highest also what lies beyond).
#[pyclass(frozen, module = "pixelcnn")]
pub struct Distribution {
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

/// What a pickled distribution is made of again.
type Parts = (
    Py<PyArrayDyn<f32>>,
    Py<PyArrayDyn<f32>>,
    Py<PyArrayDyn<f32>>,
);

/// Levels in what values are scaled to.
const LEVELS: f32 = 127.5;

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
    /// Of all channels of some images, \[N, H, W, C, components\].
    pub fn new(
        py: Python<'_>,
        shape: [usize; 5],
        mixtures: Vec<ChannelMixture>,
    ) -> PyResult<Distribution> {
        let weights = mixtures.iter().flat_map(|one| {
            let weights: Vec<f32> = one.log_weights.iter().map(|weight| weight.exp()).collect();
            let sum: f32 = weights.iter().sum();
            weights.into_iter().map(move |weight| weight / sum)
        });
        let means = mixtures.iter().flat_map(|one| &one.means);
        let means = means.map(|mean| (mean + 1.0) * LEVELS);
        let scales = mixtures.iter().flat_map(|one| &one.log_scales);
        let scales = scales.map(|scale| scale.exp() * LEVELS);
        Ok(Distribution {
            weights: array(py, weights.collect(), &shape)?.unbind(),
            means: array(py, means.collect(), &shape)?.unbind(),
            scales: array(py, scales.collect(), &shape)?.unbind(),
        })
    }

    fn shape(&self, py: Python<'_>) -> Vec<usize> {
        self.means.bind(py).shape().to_vec()
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
        let shape = self.shape(py);
        if image >= shape[0] || row >= shape[1] || column >= shape[2] {
            return Err(PyIndexError::new_err(format!(
                "image {image}, row {row}, column {column}: there are {} of {} x {}",
                shape[0], shape[1], shape[2]
            )));
        }
        let channels = 0..shape[3];
        let of = |array: &Py<PyArrayDyn<f32>>, channel: usize| -> Vec<f32> {
            let array = array.bind(py).readonly();
            let array = array.as_array();
            let components = 0..shape[4];
            components
                .map(|component| array[[image, row, column, channel, component].as_slice()])
                .collect()
        };
        let levels = channels.flat_map(|channel| {
            let weights = of(&self.weights, channel);
            let (means, scales) = (of(&self.means, channel), of(&self.scales, channel));
            let one = ChannelMixture {
                log_weights: weights.iter().map(|weight| weight.ln()).collect(),
                means: means.iter().map(|mean| mean / LEVELS - 1.0).collect(),
                log_scales: scales.iter().map(|scale| (scale / LEVELS).ln()).collect(),
            };
            (0..=255).map(move |level| f64::from(one.log_prob(from_level(level))).exp())
        });
        array(py, levels.collect(), &[shape[3], 256])
    }

    /// For `pickle` and `copy`.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Parts)> {
        let make = py.get_type::<Distribution>().getattr("_of_arrays")?;
        let part = |array: &Py<PyArrayDyn<f32>>| array.clone_ref(py);
        Ok((
            make,
            (part(&self.weights), part(&self.means), part(&self.scales)),
        ))
    }

    #[staticmethod]
    fn _of_arrays(
        weights: Py<PyArrayDyn<f32>>,
        means: Py<PyArrayDyn<f32>>,
        scales: Py<PyArrayDyn<f32>>,
    ) -> Distribution {
        Distribution {
            weights,
            means,
            scales,
        }
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let shape = self.shape(py);
        format!(
            "<pixelcnn.Distribution of {} images {}x{}x{}, {} components>",
            shape[0], shape[1], shape[2], shape[3], shape[4]
        )
    }
}
