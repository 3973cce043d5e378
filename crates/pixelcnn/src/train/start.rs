//! The state before the first step: with drawn parameters, or with a trained model's weights.

use std::collections::HashMap;

use pixelcnn_core::network::{Layout, ParameterKind};
use rand::seq::SliceRandom;

use super::TrainError;
use super::config::{PolyakStart, RunConfig};
use super::state::{OtherModel, TrainState, expect_same};
use super::step::dropout;
use crate::data::Dataset;
use crate::device::Device;
use crate::network::{Batch, draw_parameters, initialise};
use crate::random::{Purpose, generator};
use crate::weights::hub;
use crate::{Model, ModelConfig};

/// The state before the first step.
pub(super) fn drawn(
    config: &RunConfig,
    data: &Dataset,
    device: Device,
) -> Result<TrainState, TrainError> {
    let (model, train) = (&config.model, &config.train);
    let drawn = draw_parameters(model, train.seed);
    let mut indices: Vec<usize> = (0..data.len()).collect();
    let mut random = generator(train.seed, Purpose::InitBatch, 0);
    let (indices, _) = indices.partial_shuffle(&mut random, train.init_batch_size);
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    data.read(indices, &mut images, &mut labels)?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        ..Batch::default()
    };
    let mut parameters = drawn.clone();
    let dropout = dropout(config, 0);
    initialise(model, &mut parameters, batch, dropout, &device)?;
    let average = match train.polyak_start {
        PolyakStart::Initialised | PolyakStart::Growing => parameters.clone(),
        PolyakStart::Drawn => drawn,
    };
    Ok(TrainState {
        run: Some(config.clone()),
        class_names: class_names(model, data),
        ..TrainState::new(model, train, parameters, average)
    })
}

/// The names of a model's classes in its data; none of an unconditional one.
pub(super) fn class_names(model: &ModelConfig, data: &Dataset) -> Vec<String> {
    hub::class_names(data.class_names().to_vec(), model)
}

/// Whether classes have names, and other ones.
pub(super) fn differ(names: &[String], others: &[String]) -> bool {
    !names.is_empty() && !others.is_empty() && names != others
}

impl TrainState {
    /// A training on these images before its first step, with a trained model's weights in place of drawn ones:
    /// the start of fine-tuning, for [`Training::begin_with`](super::Training::begin_with). The run's model may take
    /// images of another size, know other classes and be told of other augmentations.
    ///
    /// Classes are known by their names; where the images or the model have none, by their numbers, if there are as
    /// many. New ones begin as the mean of those that the model knows. An augmentation that it was not told of begins
    /// like an image as it is.
    ///
    /// # Errors
    /// [`OtherModel`] where the models differ in anything else.
    ///
    /// # Panics
    /// If the trained model's weights are not those of its shape.
    pub fn of_model(
        model: Model,
        config: &RunConfig,
        images: &Dataset,
    ) -> Result<TrainState, OtherModel> {
        let (own, wanted) = (&model.config, &config.model);
        let alike = ModelConfig {
            height: wanted.height,
            width: wanted.width,
            nr_classes: wanted.nr_classes,
            augmentation: wanted.augmentation,
            ..own.clone()
        };
        expect_same(&alike, wanted)?;
        let from = Layout::new(own);
        assert!(from.misfit(&model.weights).is_none(), "weights of a shape");

        let origin = model.card.as_origin();
        let known = model.card.class_names;
        let mut names = class_names(wanted, images);
        // The number that each class has in the model.
        let as_many = own.nr_classes == wanted.nr_classes;
        let numbers: Vec<Option<usize>> = match names.is_empty() || known.is_empty() {
            true => (0..wanted.nr_classes)
                .map(|class| as_many.then_some(class))
                .collect(),
            false => names
                .iter()
                .map(|name| known.iter().position(|known| known == name))
                .collect(),
        };
        let same_classes = as_many && !differ(&names, &known);
        if same_classes && names.is_empty() {
            names = known;
        }

        let mut weights: HashMap<String, Vec<f32>> = HashMap::new();
        let mut bias = String::new();
        for (parameter, values) in from.parameters.into_iter().zip(model.weights) {
            let mut values = values;
            if parameter.kind == ParameterKind::Hw && !same_classes && own.nr_classes > 0 {
                // What the classes have in common goes to the bias of the convolution that they are added to.
                let channels = parameter.shape[1];
                let (classes, _) = values.split_at_mut(own.nr_classes * channels);
                let mut mean = vec![0.0; channels];
                for row in classes.chunks_exact(channels) {
                    add(&mut mean, row, 1.0 / own.nr_classes as f32);
                }
                for row in classes.chunks_exact_mut(channels) {
                    add(row, &mean, -1.0);
                }
                let bias = weights.get_mut(&bias).expect("the parameter before");
                add(bias, &mean, 1.0);
            }
            bias.clone_from(&parameter.name);
            weights.insert(parameter.name, values);
        }
        let taken = Layout::new(wanted).parameters.into_iter().map(|parameter| {
            let own_values = weights.remove(&parameter.name);
            if parameter.kind != ParameterKind::Hw {
                return own_values.expect("models that are alike");
            }
            let channels = parameter.shape[1];
            let own_values = own_values.unwrap_or_default();
            let own_rows: Vec<&[f32]> = own_values.chunks_exact(channels).collect();
            let of_augmentations = own_rows.iter().skip(own.nr_classes);
            let mut rows = numbers
                .iter()
                .map(|number| number.map(|number| own_rows[number]))
                // Flips are the first of symmetries.
                .chain(of_augmentations.map(|row| Some(*row)));
            let mut values = vec![0.0; parameter.len()];
            for value in values.chunks_exact_mut(channels) {
                if let Some(Some(row)) = rows.next() {
                    value.copy_from_slice(row);
                }
            }
            values
        });
        let parameters: Vec<Vec<f32>> = taken.collect();
        Ok(TrainState {
            class_names: names,
            origin: Some(origin),
            ..TrainState::new(wanted, &config.train, parameters.clone(), parameters)
        })
    }
}

/// `sum += factor * values`.
fn add(sum: &mut [f32], values: &[f32], factor: f32) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += factor * value;
    }
}
