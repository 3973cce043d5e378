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

impl TrainState {
    /// A training on these images before its first step, with a trained model's weights in place of drawn ones:
    /// the start of fine-tuning. The run's model may take images of another size, know other classes and be told
    /// of other augmentations. Classes that the trained one does not know begin as the mean of those that it
    /// knows; an augmentation that it was not told of begins like an image as it is.
    ///
    /// # Errors
    /// [`OtherModel`] where the models differ in anything else.
    ///
    /// # Panics
    /// If the trained model's weights are not those of its shape.
    pub fn of_model(
        model: &Model,
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
        let mut names = class_names(wanted, images);
        let known = &model.card.class_names;
        let are_named = !names.is_empty() && !known.is_empty();
        let same_classes = own.nr_classes == wanted.nr_classes && !(are_named && names != *known);
        if same_classes && names.is_empty() {
            names.clone_from(known);
        }

        let (from, to) = (Layout::new(own), Layout::new(wanted));
        assert!(from.misfit(&model.weights).is_none(), "weights of a shape");
        let mut weights = model.weights.clone();
        let of_classes = |hw: &[f32]| hw.len() / own.nr_conditions().max(1) * own.nr_classes;
        for (number, parameter) in from.parameters.iter().enumerate() {
            if parameter.kind == ParameterKind::Hw && !same_classes && own.nr_classes > 0 {
                // The bias of the convolution that the classes are added to is the parameter before.
                let (before, after) = weights.split_at_mut(number);
                let (bias, hw) = (&mut before[number - 1], &after[0]);
                for row in hw[..of_classes(hw)].chunks_exact(bias.len()) {
                    for (bias, value) in bias.iter_mut().zip(row) {
                        *bias += value / own.nr_classes as f32;
                    }
                }
            }
        }
        let numbers = from.parameters.iter().map(|p| &*p.name).zip(0..);
        let numbers: HashMap<&str, usize> = numbers.collect();
        let taken = to.parameters.iter().map(|parameter| {
            let own_weights = numbers.get(&*parameter.name).map(|&n| &weights[n][..]);
            if parameter.kind != ParameterKind::Hw {
                return own_weights.expect("models that are alike").to_vec();
            }
            let mut hw = vec![0.0; parameter.len()];
            if let Some(known) = own_weights {
                let classes = parameter.len() / wanted.nr_conditions() * wanted.nr_classes;
                let parts = hw.split_at_mut(classes);
                let known = known.split_at(of_classes(known));
                if same_classes {
                    parts.0.copy_from_slice(known.0);
                }
                if own.augmentation == wanted.augmentation {
                    parts.1.copy_from_slice(known.1);
                }
            }
            hw
        });
        let parameters: Vec<Vec<f32>> = taken.collect();
        Ok(TrainState {
            class_names: names,
            ..TrainState::new(wanted, &config.train, parameters.clone(), parameters)
        })
    }
}
