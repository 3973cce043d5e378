//! One step of training: the next batch of the epoch's order, its gradients, the update.

use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use pixelcnn_core::kernels::pointwise::Dropout;
use pixelcnn_core::ranks::{Ranks, Sharing};
use rand::RngExt;

use super::config::RunConfig;
use super::metrics::Record;
use super::schedule::next_step;
use super::state::{TrainState, Unrecorded};
use super::{Event, TrainError, augment};
use crate::data::Dataset;
use crate::device::Device;
use crate::network::{Batch, EngineError, Network};
use crate::random::{Purpose, generator};

/// Dropout of a step: the initialisation pass is step 0. The noise of the energy distance has its seed too.
pub(super) fn dropout(config: &RunConfig, step: u64) -> Option<Dropout> {
    let RunConfig { model, train, .. } = config;
    let mut random = generator(train.seed, Purpose::Dropout, step);
    (train.dropout > 0.0 || model.energy_distance).then(|| Dropout {
        rate: train.dropout,
        seed: random.random(),
        first: 0,
    })
}

/// The images of an epoch in the order in which they are used.
struct Order {
    epoch: u64,
    indices: Vec<usize>,
}

pub(super) struct Trainer<'a> {
    pub config: &'a RunConfig,
    data: &'a Dataset,
    pub network: Network,
    pub ranks: Arc<dyn Ranks>,
    /// The numbers of this rank's images in a batch.
    own: Range<usize>,
    /// Whether the network's engine has the state's arrays.
    lent: bool,
    order: Option<Order>,
    images: Vec<u8>,
    labels: Vec<u32>,
    pub state: TrainState,
}

impl<'a> Trainer<'a> {
    /// Goes on from a state.
    pub fn new(
        config: &'a RunConfig,
        data: &'a Dataset,
        state: TrainState,
        device: Device,
        sharing: Sharing,
    ) -> Result<Trainer<'a>, TrainError> {
        let (ranks, own) = (sharing.ranks.clone(), sharing.images());
        let mut engine = device.engine(&config.model)?;
        engine.share(Some(sharing))?;
        engine.expect_room(own.len())?;
        Ok(Trainer {
            config,
            data,
            network: Network::of(engine),
            ranks,
            own,
            lent: false,
            order: None,
            images: Vec::new(),
            labels: Vec::new(),
            state,
        })
    }

    /// The state, with the arrays that the engine has while steps are taken.
    pub fn state(&mut self) -> Result<&mut TrainState, EngineError> {
        if mem::take(&mut self.lent) {
            self.state.take_arrays(self.network.engine().unload()?);
        }
        Ok(&mut self.state)
    }

    fn steps_per_epoch(&self) -> u64 {
        self.config.train.steps_per_epoch(self.data.len())
    }

    /// The step after which the run ends; none as long as only time can tell.
    pub fn last_step(&self) -> Option<u64> {
        let train = &self.config.train;
        train.last_step(self.steps_per_epoch(), &self.state)
    }

    /// What the other ranks must be told of the next step: whether it begins with the engine taking
    /// the state over, and when the run ends, where time has decided that.
    pub fn orders(&self) -> Vec<u8> {
        let last_step = self.state.last_step.map(u64::to_le_bytes);
        let last_step = last_step.iter().flatten().copied();
        [u8::from(!self.lent)]
            .into_iter()
            .chain(last_step)
            .collect()
    }

    /// Prepares the next step as rank 0 does.
    pub fn obey(&mut self, orders: &[u8]) -> Result<(), EngineError> {
        if orders.first() == Some(&1) {
            self.state()?;
        }
        let last_step = orders.get(1..).and_then(|bytes| bytes.try_into().ok());
        self.state.last_step = last_step.map(u64::from_le_bytes);
        Ok(())
    }

    /// Reads this rank's share of the next batch of the epoch's order.
    fn read_batch(&mut self) -> Result<(), TrainError> {
        let epoch = self.state.epoch;
        if self.order.as_ref().is_none_or(|order| order.epoch != epoch) {
            let indices = self.data.epoch_order(self.state.seed, epoch);
            self.order = Some(Order { epoch, indices });
        }
        let order = &self.order.as_ref().expect("just made").indices;
        let start = self.state.position as usize;
        let batch = &order[start + self.own.start..start + self.own.end];
        let (images, labels) = (&mut self.images, &mut self.labels);
        self.data
            .read_in_epoch(self.state.seed, epoch, batch, images, labels)?;
        Ok(())
    }

    /// The mean of the steps since the last record.
    pub fn record(&self) -> Record {
        let state = &self.state;
        let Unrecorded {
            steps,
            bits_per_dim,
            seconds,
        } = state.unrecorded;
        let images = steps as f64 * self.config.train.batch_size as f64;
        Record::Train {
            step: state.step,
            epoch: state.epoch,
            train_bits_per_dim: bits_per_dim / steps as f64,
            learning_rate: self.learning_rate(),
            images_per_second: images / seconds,
            seconds: state.seconds,
        }
    }

    /// Learning rate of the last step.
    fn learning_rate(&self) -> f64 {
        let TrainState {
            step,
            learning_rate,
            ..
        } = self.state;
        let train = &self.config.train;
        learning_rate * train.learning_rate_factor(step, self.last_step())
    }

    /// Takes one step.
    pub fn step(&mut self) -> Result<Event, TrainError> {
        let start = Instant::now();
        let train = &self.config.train;
        self.read_batch()?;
        if !mem::replace(&mut self.lent, true) {
            self.network.engine().load(self.state.lend_arrays())?;
        }
        let step = self.state.step + 1;
        let model = &self.config.model;
        let augmentations = augment::draw(model, train.seed, step, self.own.clone());
        augment::apply(model, &augmentations, &mut self.images);
        let dropout = dropout(self.config, step);
        let update = next_step(&self.state, train, self.last_step());
        let batch = Batch {
            images: &self.images,
            labels: &self.labels,
            augmentations: &augmentations,
        };
        let nats = match self.network.engine().step(batch, dropout, &update) {
            Err(EngineError::NotANumber) => {
                return Err(TrainError::NotANumber {
                    step: update.adam.step,
                    last_good: None,
                });
            }
            nats => nats?,
        };
        let state = &mut self.state;
        state.step = update.adam.step;
        state.learning_rate *= train.learning_rate_decay;
        state.images_seen += train.batch_size as u64;
        state.position += train.batch_size as u64;
        // The original drops the images that do not fill a batch.
        if state.position as usize + train.batch_size > self.data.len() {
            state.epoch += 1;
            state.position = 0;
        }
        let bits_per_dim = self
            .config
            .model
            .bits_per_dim(nats / train.batch_size as f64);
        let seconds = start.elapsed().as_secs_f64();
        state.seconds += seconds;
        state.unrecorded.steps += 1;
        state.unrecorded.bits_per_dim += bits_per_dim;
        state.unrecorded.seconds += seconds;
        Ok(Event::Step {
            step: self.state.step,
            epoch: self.state.epoch,
            bits_per_dim,
            learning_rate: update.adam.learning_rate,
            seconds,
            last_step: train.expected_last_step(self.steps_per_epoch(), &self.state),
        })
    }
}
