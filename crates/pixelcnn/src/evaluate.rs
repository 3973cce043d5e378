//! Exact likelihoods of whole data sets, in bits/dim.

use std::cmp::Reverse;
use std::ops::{ControlFlow, Range};

use pixelcnn_core::incremental::EvaluatorError;
use pixelcnn_core::{ModelConfig, Stopped, go_on};
use serde::{Deserialize, Serialize};

use crate::data::{DataError, Dataset};
use crate::network::{Batch, EngineError, Network};

/// Pixels that are evaluated at a time, at most, if that is an image at least: more would not be faster,
/// and take memory.
const PIXELS: usize = 1 << 20;

/// How many images of a size to evaluate at a time where so many are wanted: fewer where they are large.
pub fn at_a_time([height, width]: [usize; 2], wanted: usize) -> usize {
    wanted.clamp(1, (PIXELS / (height * width)).max(1))
}

/// Images that are not what a model takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{data}: the model takes {model}: choose other images, or train a model on these")]
pub struct WrongImages {
    /// What the images are.
    pub data: String,
    /// What they should be.
    pub model: String,
}

/// Checks that a data set has the channels and, for a class-conditional model, the classes that a model
/// takes, of whatever sizes its images are. Classes without names may be fewer: labels in arrays do not tell how many
/// there are.
///
/// # Errors
/// [`WrongImages`] where it has not.
pub fn expect_images(model: &ModelConfig, data: &Dataset) -> Result<(), WrongImages> {
    let classes = model.nr_classes;
    let same_codes = match data.codes() {
        None => model.nr_codes == 0,
        Some([own, coarse]) => {
            own <= model.nr_codes
                && coarse <= model.nr_coarse_codes
                && (coarse > 0) == (model.nr_coarse_codes > 0)
        }
    };
    let fits = data.channels() == model.channels && same_codes;
    let classes_fit = match (classes, data.class_names()) {
        (0, _) => true,
        (_, []) => (1..=classes).contains(&data.nr_classes()),
        (_, names) => names.len() == classes,
    };
    if fits && classes_fit {
        return Ok(());
    }
    let mut takes = match (model.nr_codes, model.nr_coarse_codes) {
        (0, _) => match model.channels {
            1 => "grey images".into(),
            _ => "images of 3 channels".into(),
        },
        (codes, 0) => format!("maps of {codes} codes"),
        (codes, coarse) => format!("maps of {codes} codes with coarser ones of {coarse}"),
    };
    if classes > 0 {
        takes += &format!(" in {classes} classes");
    }
    Err(WrongImages {
        data: data.describe(),
        model: takes,
    })
}

/// Why images can't be evaluated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// They can't be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// They are not what the network takes.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model is one of codes where one of images is needed, or has no likelihood.
    #[error(transparent)]
    Evaluator(#[from] EvaluatorError),
    /// There are no classes to find.
    #[error("the model knows no classes: take one that was trained on images with classes")]
    Unconditional,
    /// `progress` said so.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// The likelihood of a set of images under a model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Evaluation {
    /// Bits per dimension of every image, in the data's order.
    pub bits_per_dim: Vec<f64>,
    /// Class of every image; empty where the data have none.
    pub labels: Vec<u32>,
}

impl Evaluation {
    /// That of several sets of images, one after the other, as of one.
    pub fn concat(parts: Vec<Evaluation>) -> Evaluation {
        let mut whole = Evaluation::default();
        for part in parts {
            whole.bits_per_dim.extend(part.bits_per_dim);
            whole.labels.extend(part.labels);
        }
        whole
    }

    /// Evaluates some more images.
    pub(crate) fn add(&mut self, network: &Network, batch: Batch) -> Result<(), EngineError> {
        let nats = network.nats_per_image(batch)?;
        let bits = nats.iter().map(|&nats| network.config().bits_per_dim(nats));
        self.bits_per_dim.extend(bits);
        self.labels.extend(batch.labels);
        Ok(())
    }

    /// Puts the images, which were evaluated in an order, in their own.
    pub(crate) fn put_in(&mut self, order: &Order) {
        order.put(1, &mut self.bits_per_dim);
        order.put(1, &mut self.labels);
    }

    /// Mean bits/dim over the images.
    pub fn mean(&self) -> f64 {
        self.bits_per_dim.iter().sum::<f64>() / self.bits_per_dim.len() as f64
    }

    /// Standard error of that mean: the images' sample deviation over the root of their number.
    pub fn standard_error(&self) -> f64 {
        let n = self.bits_per_dim.len() as f64;
        let mean = self.mean();
        let squares = self.bits_per_dim.iter().map(|bits| (bits - mean).powi(2));
        (squares.sum::<f64>() / (n - 1.0).max(1.0) / n).sqrt()
    }
}

/// Evaluates some images of a data set that follow one another, `batch_size` at a time, the last batch
/// smaller where the number does not divide. `progress` sees what is evaluated so far after every
/// batch and can stop it.
///
/// # Errors
/// Where images can't be read or are not what the network takes, or stopped.
pub fn evaluate(
    network: &mut Network,
    data: &Dataset,
    images: Range<usize>,
    batch_size: usize,
    progress: &mut dyn FnMut(&Evaluation) -> ControlFlow<()>,
) -> Result<Evaluation, EvaluateError> {
    let mut evaluation = Evaluation::default();
    let order = in_batches(network, data, images, batch_size, |network, batch| {
        evaluation.add(network, batch)?;
        Ok::<_, EvaluateError>(go_on(progress(&evaluation))?)
    })?;
    evaluation.put_in(&order);
    Ok(evaluation)
}

/// The places, among some images, of those that were evaluated one after the other: images of one size
/// go together.
pub(crate) struct Order(Vec<usize>);

impl Order {
    /// Puts what was found of each image, so many values of each, in the order of the images.
    pub fn put<T: Clone>(&self, of_each: usize, values: &mut [T]) {
        if self.0.is_sorted() || values.is_empty() {
            return;
        }
        let found = values.to_vec();
        for (place, found) in self.0.iter().zip(found.chunks_exact(of_each)) {
            values[place * of_each..][..of_each].clone_from_slice(found);
        }
    }
}

/// Reads the images at `indices` and gives them to `each`, with the network as they need it: those of one
/// size `batch_size` at a time, or fewer where they are large. The network is then as it was.
pub(crate) fn in_batches<E: From<DataError> + From<EngineError>>(
    network: &mut Network,
    data: &Dataset,
    indices: impl IntoIterator<Item = usize>,
    batch_size: usize,
    mut each: impl FnMut(&Network, Batch) -> Result<(), E>,
) -> Result<Order, E> {
    let indices: Vec<usize> = indices.into_iter().collect();
    let mut order: Vec<usize> = (0..indices.len()).collect();
    // Large ones first: what is left to do is then less than it seems, and memory fails early.
    let area = |size: [usize; 2]| size[0] * size[1];
    order.sort_by_key(|&place| {
        let size = data.size(indices[place]);
        (Reverse(area(size)), size)
    });
    let ModelConfig { height, width, .. } = *network.config();
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    let mut evaluate = || {
        for places in order.chunk_by(|&a, &b| data.size(indices[a]) == data.size(indices[b])) {
            let size = data.size(indices[places[0]]);
            network.resize(size)?;
            for places in places.chunks(at_a_time(size, batch_size)) {
                let indices: Vec<usize> = places.iter().map(|&place| indices[place]).collect();
                data.read(&indices, &mut images, &mut labels)?;
                let batch = Batch {
                    images: &images,
                    labels: &labels,
                    ..Batch::default()
                };
                each(network, batch)?;
            }
        }
        Ok(())
    };
    let evaluated = evaluate();
    network.resize([height, width])?;
    evaluated.map(|()| Order(order))
}
