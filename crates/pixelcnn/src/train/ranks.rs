//! What the ranks of a training tell one another: rank 0 leads, the others follow its orders. They
//! have no run folder, save nothing and say nothing.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use pixelcnn_core::kernels::simd;
use pixelcnn_core::ranks::{RankError, Ranks, broadcast, gather, share};
use sha2::{Digest, Sha256};

use super::config::RunConfig;
use super::state::TrainState;
use super::step::Trainer;
use super::{TrainError, Training};
use crate::data::{DataError, Dataset};
use crate::device::Device;
use crate::evaluate::{Evaluation, evaluate};
use crate::hex;
use crate::sample::{Drawn, Sampler, Sampling, sample};

/// What rank 0 says to all others; the first byte of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Order {
    /// All is over.
    End,
    /// The settings of the run, as TOML, follow.
    Settings,
    /// What all must have in common follows.
    Compare,
    /// The state follows.
    Load,
    /// Take the next step, as [`Trainer::orders`] says: from a state that the engine takes over anew
    /// where rank 0 does, for the GPUs of all ranks must record their steps together.
    Step,
    /// Evaluate this rank's share of the test images with the averaged parameters.
    Evaluate,
    /// Draw this rank's share of the samples.
    Sample,
}

const ORDERS: [Order; 7] = [
    Order::End,
    Order::Settings,
    Order::Compare,
    Order::Load,
    Order::Step,
    Order::Evaluate,
    Order::Sample,
];

/// Gives an order, with what follows it.
pub(super) fn order(ranks: &dyn Ranks, order: Order, with: &[u8]) -> Result<(), RankError> {
    if ranks.count() == 1 {
        return Ok(());
    }
    let mut message = [&[order as u8], with].concat();
    broadcast(ranks, &mut message)
}

/// The next order, and what follows it.
fn hear(ranks: &dyn Ranks) -> Result<(Order, Vec<u8>), TrainError> {
    let mut message = Vec::new();
    broadcast(ranks, &mut message)?;
    let number = message.first().copied();
    let order = ORDERS
        .into_iter()
        .find(|order| Some(*order as u8) == number);
    let order = order.ok_or(TrainError::Ranks(OTHER_VERSION))?;
    message.remove(0);
    Ok((order, message))
}

/// Tells all other ranks what is trained and in which folder, before [`Training::begin`] or
/// [`Training::resume`].
///
/// # Errors
/// [`RankError`].
pub fn announce(ranks: &dyn Ranks, folder: &Path, config: &RunConfig) -> Result<(), RankError> {
    let config = toml::to_string(config).unwrap_or_default();
    let message = format!("{}\0{config}", folder.display());
    order(ranks, Order::Settings, message.as_bytes())
}

/// The folder and the settings that rank 0 [announces](announce), before [`Training::follow`]; none
/// where it has nothing to train.
///
/// # Errors
/// Where rank 0 can't be reached or understood.
pub fn announced(ranks: &dyn Ranks) -> Result<Option<(PathBuf, RunConfig)>, TrainError> {
    loop {
        match hear(ranks)? {
            (Order::End, _) => return Ok(None),
            (Order::Settings, message) => {
                let message = String::from_utf8_lossy(&message);
                let found = message.split_once('\0').and_then(|(folder, config)| {
                    Some((PathBuf::from(folder), toml::from_str(config).ok()?))
                });
                return Ok(Some(found.ok_or(TrainError::Ranks(OTHER_VERSION))?));
            }
            _ => {}
        }
    }
}

/// Lets all other ranks end: there is nothing to train. A training that began does it by itself.
pub fn dismiss(ranks: &dyn Ranks) {
    // Whom it does not reach is gone.
    let _ = order(ranks, Order::End, &[]);
}

/// What all ranks must have in common, a line each, so that they compute the same.
pub(super) fn common(
    config: &RunConfig,
    device: Device,
    images: &Dataset,
    test: &Dataset,
) -> Result<String, DataError> {
    let config = toml::to_string(config).unwrap_or_default();
    Ok([
        env!("CARGO_PKG_VERSION").to_owned(),
        device.kind(),
        format!("{:?}", simd::level()),
        hex(&Sha256::digest(config.as_bytes())),
        images.fingerprint()?,
        test.fingerprint()?,
    ]
    .join("\n"))
}

/// What a rank has where a line differs.
const DIFFERENCES: [&str; 6] = [
    OTHER_VERSION,
    "another kind of device",
    "other vector instructions",
    "other settings",
    "other training images",
    "other test images",
];
const OTHER_VERSION: &str = "another version of this program";

/// What this rank has otherwise than rank 0.
fn difference(own: &str, common: &str) -> Option<&'static str> {
    let mut lines = DIFFERENCES.iter().zip(own.lines().zip(common.lines()));
    let differing = lines.find(|(_, (own, common))| own != common);
    differing.map(|(what, _)| *what)
}

/// Evaluates the test images together; this is rank 0. Others are told by the order.
pub(super) fn evaluate_together(
    trainer: &mut Trainer,
    test: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Evaluation, TrainError> {
    order(&*trainer.ranks, Order::Evaluate, &[])?;
    let parts = evaluate_part(trainer, test, batch_size, progress)?;
    Ok(Evaluation::concat(parts))
}

/// Evaluates this rank's part of the test images; gives rank 0 what all come to.
fn evaluate_part(
    trainer: &mut Trainer,
    test: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Evaluation>, TrainError> {
    trainer.state()?;
    let Trainer {
        network,
        state,
        ranks,
        ..
    } = trainer;
    network.engine().load_weights(&state.average)?;
    let (rank, count) = (ranks.rank(), ranks.count());
    gather(&**ranks, |beat| {
        let own = share(test.len(), rank, count);
        let mut progress = |so_far: &Evaluation| {
            beat()?;
            progress(so_far.bits_per_dim.len() * count)
        };
        Ok(evaluate(network, test, own, batch_size, &mut progress)?)
    })
}

/// Draws images from the averaged parameters together; this is rank 0. Others are told by the order.
pub(super) fn sample_together(
    trainer: &Trainer,
    device: &Device,
    test: &Dataset,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<u8>, TrainError> {
    order(&*trainer.ranks, Order::Sample, &[])?;
    Ok(sample_part(trainer, device, test, progress)?.concat())
}

/// Draws this rank's part of the images; gives rank 0 all.
fn sample_part(
    trainer: &Trainer,
    device: &Device,
    test: &Dataset,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Vec<u8>>, TrainError> {
    let RunConfig { model, train, .. } = trainer.config;
    let (images, classes) = (train.samples, model.nr_classes.max(1));
    let mut labels: Vec<u32> = (0..images).map(|image| (image % classes) as u32).collect();
    let mut coarse = Vec::new();
    if model.nr_coarse_codes > 0 {
        // Coarser maps of test images, and what class those are of.
        let given: Vec<usize> = (0..images).map(|image| image % test.len()).collect();
        let mut of_given = Vec::new();
        test.read(&given, &mut coarse, &mut of_given)?;
        if model.nr_classes > 0 {
            labels = of_given;
        }
    }
    let sampling = Sampling {
        coarse,
        labels,
        temperature: 1.0,
        seed: trainer.state.seed,
    };
    let ranks = &*trainer.ranks;
    let own = share(images, ranks.rank(), ranks.count());
    gather(ranks, |beat| {
        let sampler = Sampler::new(model, &trainer.state.average, device)?;
        let mut progress = |Drawn { done, .. }: Drawn| {
            beat()?;
            progress(done)
        };
        Ok(sample(&sampler, &sampling, own, &mut progress)?)
    })
}

impl Training<'_> {
    /// Takes part in a training that rank 0 begins or resumes, to its end; `go_on` is asked in long
    /// work whether it is to stop.
    ///
    /// # Errors
    /// As [`Training::begin`], and where this rank has not what rank 0 has.
    pub fn follow(&self, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<(), TrainError> {
        let ranks = self.ranks();
        let mut trainer: Option<Trainer> = None;
        let early = || TrainError::Ranks(OTHER_VERSION);
        loop {
            match hear(&*ranks)? {
                (Order::End, _) => return Ok(()),
                (Order::Settings, _) => {}
                (Order::Compare, common_) => {
                    let own = common(self.config, self.device, self.images, self.test)?;
                    let theirs = String::from_utf8_lossy(&common_);
                    if let Some(what) = difference(&own, &theirs) {
                        return Err(TrainError::Ranks(what));
                    }
                }
                (Order::Load, state) => {
                    let state = TrainState::of_bytes(&state, Path::new("rank 0"));
                    let state = state.map_err(|_| early())?;
                    trainer = Some(self.trainer(state)?);
                }
                (Order::Step, orders) => {
                    let trainer = trainer.as_mut().ok_or_else(early)?;
                    trainer.obey(&orders)?;
                    match trainer.step() {
                        // Rank 0 has found it too.
                        Err(TrainError::NotANumber { .. }) => {}
                        step => drop(step?),
                    }
                }
                (Order::Evaluate, _) => {
                    let trainer = trainer.as_mut().ok_or_else(early)?;
                    let size = self.device.images_at_a_time();
                    let mut go_on = |_| go_on();
                    unless_over(evaluate_part(trainer, self.test, size, &mut go_on))?;
                }
                (Order::Sample, _) => {
                    let trainer = trainer.as_mut().ok_or_else(early)?;
                    trainer.state()?;
                    let mut go_on = |_| go_on();
                    unless_over(sample_part(trainer, &self.device, self.test, &mut go_on))?;
                }
            }
        }
    }
}

/// Does not mind that rank 0 has ended some work, of which it knows why.
fn unless_over<T>(done: Result<T, TrainError>) -> Result<(), TrainError> {
    match done {
        Err(TrainError::Rank(RankError::Over)) => Ok(()),
        done => done.map(drop),
    }
}
