//! What the ranks of a training tell one another: rank 0 leads, the others follow its orders. They
//! have no run folder, save nothing and say nothing.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use pixelcnn_core::kernels::simd;
use pixelcnn_core::ranks::{RankError, Ranks, broadcast, share};
use sha2::{Digest, Sha256};

use super::config::RunConfig;
use super::state::TrainState;
use super::step::Trainer;
use super::{TrainError, Training};
use crate::data::{DataError, Dataset};
use crate::evaluate::{EvaluateError, Evaluation, evaluate_range};

/// What rank 0 says to all others; the first byte of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Order {
    /// All is over.
    End,
    /// Wait for the next order: rank 0 is busy.
    Wait,
    /// The settings of the run, as TOML, follow.
    Settings,
    /// What all must have in common follows.
    Compare,
    /// The state follows.
    Load,
    /// Take the next step.
    Step,
    /// Evaluate this rank's share of the test images with the averaged parameters.
    Evaluate,
    /// Send what the evaluation gave.
    Collect,
}

const ORDERS: [Order; 8] = [
    Order::End,
    Order::Wait,
    Order::Settings,
    Order::Compare,
    Order::Load,
    Order::Step,
    Order::Evaluate,
    Order::Collect,
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
    images: &Dataset,
    test: &Dataset,
) -> Result<String, DataError> {
    let config = toml::to_string(config).unwrap_or_default();
    Ok([
        env!("CARGO_PKG_VERSION").to_owned(),
        format!("{:?}", simd::level()),
        sum_of(config.as_bytes()),
        sample_of(images)?,
        sample_of(test)?,
    ]
    .join("\n"))
}

/// What a rank has where a line differs.
const DIFFERENCES: [&str; 5] = [
    OTHER_VERSION,
    "other vector instructions",
    "other settings",
    "other training images",
    "other test images",
];
const OTHER_VERSION: &str = "another version of this program";

fn sum_of(bytes: &[u8]) -> String {
    format!("{:02x?}", Sha256::digest(bytes).as_slice())
}

/// How many images there are, and the checksum of a few.
fn sample_of(data: &Dataset) -> Result<String, DataError> {
    let few = data.len().min(16);
    let spread: Vec<usize> = (0..few).map(|n| n * data.len() / few).collect();
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    data.read(&spread, &mut images, &mut labels)?;
    labels
        .iter()
        .for_each(|label| images.extend(label.to_le_bytes()));
    Ok(format!("{} {}", data.describe(), sum_of(&images)))
}

/// What this rank has otherwise than rank 0.
fn difference(own: &str, common: &str) -> Option<&'static str> {
    let mut lines = DIFFERENCES.iter().zip(own.lines().zip(common.lines()));
    let differing = lines.find(|(_, (own, common))| own != common);
    differing.map(|(what, _)| *what)
}

/// Evaluates the test images together; this is rank 0. Others are told by the orders.
pub(super) fn evaluate_together(
    trainer: &mut Trainer,
    test: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Evaluation, TrainError> {
    let ranks = trainer.ranks.clone();
    let count = ranks.count();
    order(&*ranks, Order::Evaluate, &[])?;
    let mut evaluation = evaluate_share(trainer, test, batch_size, &mut |done| {
        progress(done * count)
    })?;
    order(&*ranks, Order::Collect, &[])?;
    for rank in 1..count {
        let others = share(test.len(), rank, count);
        let mut bytes = vec![0; others.len() * size_of::<f64>()];
        ranks.receive(rank, &mut bytes)?;
        let bits = bytes.chunks_exact(size_of::<f64>());
        let bits = bits.map(|bits| f64::from_le_bytes(bits.try_into().unwrap_or_default()));
        evaluation.bits_per_dim.extend(bits);
    }
    Ok(evaluation)
}

/// Evaluates this rank's share of the test images.
fn evaluate_share(
    trainer: &mut Trainer,
    test: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Evaluation, TrainError> {
    trainer.state()?;
    let Trainer {
        network,
        state,
        ranks,
        ..
    } = trainer;
    network.engine().load_weights(&state.average)?;
    let own = share(test.len(), ranks.rank(), ranks.count());
    let mut progress = |so_far: &Evaluation| progress(so_far.bits_per_dim.len());
    Ok(evaluate_range(
        network,
        test,
        own,
        batch_size,
        &mut progress,
    )?)
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
        let mut evaluation = None;
        let early = || TrainError::Ranks(OTHER_VERSION);
        loop {
            match hear(&*ranks)? {
                (Order::End, _) => return Ok(()),
                (Order::Wait | Order::Settings, _) => {}
                (Order::Compare, common_) => {
                    let own = common(self.config, self.images, self.test)?;
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
                (Order::Step, _) => {
                    match trainer.as_mut().ok_or_else(early)?.step() {
                        // Rank 0 has found it too.
                        Err(TrainError::NotANumber { .. }) => {}
                        step => drop(step?),
                    }
                }
                (Order::Evaluate, _) => {
                    let trainer = trainer.as_mut().ok_or_else(early)?;
                    let size = self.device.images_at_a_time();
                    evaluation = match evaluate_share(trainer, self.test, size, &mut |_| go_on()) {
                        // Rank 0 is told to stop too, and does not ask for it.
                        Err(stopped @ TrainError::Evaluate(EvaluateError::Stopped(_))) => {
                            Some(Err(stopped))
                        }
                        evaluation => Some(Ok(evaluation?)),
                    };
                }
                (Order::Collect, _) => {
                    let evaluation = evaluation.take().ok_or_else(early)??;
                    let bits = evaluation.bits_per_dim.iter();
                    let bytes: Vec<u8> = bits.flat_map(|bits| bits.to_le_bytes()).collect();
                    ranks.send(0, &bytes)?;
                }
            }
        }
    }
}
