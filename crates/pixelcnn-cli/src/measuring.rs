//! What commands that evaluate images of a data set have in common: which images, and the work, with a bar.

use std::ops::{ControlFlow, Range};
use std::time::Instant;

use clap::{Args, value_parser};
use pixelcnn::data::{DataConfig, Dataset, Split};
use pixelcnn::device::Device;
use pixelcnn::evaluate::{Evaluation, evaluate};
use pixelcnn::network::Network;
use pixelcnn::ranks::{Ranks, gather, share};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::settings::{DataFlags, split};
use crate::terminal::{Bar, Result, interrupted, opening};
use crate::trained::Trained;

/// Which images of a data set, and how.
#[derive(Debug, Args)]
pub struct ImageFlags {
    /// Which images of the data [default: the test images, or all where there is no such split; of
    /// the run's own data those that it was not trained on]
    #[arg(long, value_name = "SPLIT", value_parser = split())]
    pub split: Option<Split>,
    /// Use the parameters as trained last, not their Polyak average
    #[arg(long)]
    pub raw: bool,
    /// Images evaluated side by side; changes the time and memory taken, not the result
    /// [default: 16, on a GPU 256]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = value_parser!(u32).range(1..=65_536))]
    batch_size: Option<u32>,
    /// Take the first N images only [default: all]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    limit: Option<u64>,
}

impl ImageFlags {
    /// Opens the images, and tells which split of the data they are, where they are not all.
    pub fn open(
        &self,
        trained: &Trained,
        data: &DataFlags,
    ) -> Result<(DataConfig, Option<Split>, Dataset)> {
        let config = trained.data_or(data)?;
        // A fraction that is asked for is the test split, of any data.
        let split = self.split.or(data.hold_out().then_some(Split::Test));
        let (split, data) = trained.open_measured(&config, split, &mut opening())?;
        Ok((config, split, data))
    }

    /// How many images are evaluated.
    pub fn count(&self, data: &Dataset) -> usize {
        let limit = self.limit.map_or(usize::MAX, |limit| limit as usize);
        data.len().min(limit)
    }

    /// How many of them side by side.
    pub fn batch_size(&self, device: &Device) -> usize {
        let chosen = self.batch_size.map(|n| n as usize);
        chosen.unwrap_or(device.images_at_a_time())
    }
}

/// Evaluates the first `count` images of a data set, each rank its share, and shows how far it is;
/// rank 0 has all figures.
pub fn measure(
    ranks: &dyn Ranks,
    network: &mut Network,
    data: &Dataset,
    count: usize,
    batch_size: usize,
) -> Result<Evaluation> {
    let unit = network.config().unit();
    let parts = share_out(ranks, count, |own, progress| {
        let mut progress = |so_far: &Evaluation| {
            let mean = format!("{:.4} {unit}", so_far.mean());
            progress(so_far.bits_per_dim.len(), &mean)
        };
        Ok(evaluate(network, data, own, batch_size, &mut progress)?)
    })?;
    Ok(Evaluation::concat(parts))
}

/// What is shown of an evaluation.
pub fn mean(so_far: &Evaluation) -> String {
    format!("{:.4} bits/dim", so_far.mean())
}

/// Is told how many images are done, and what has come of them.
pub type Progress<'a> = dyn FnMut(usize, &str) -> ControlFlow<()> + 'a;

/// Does `part` with this rank's share of `count` images, which tells how far it is, and shows how far all
/// are; rank 0 has what came of each share.
pub fn share_out<T: Serialize + DeserializeOwned>(
    ranks: &dyn Ranks,
    count: usize,
    part: impl FnOnce(Range<usize>, &mut Progress) -> Result<T>,
) -> Result<Vec<T>> {
    let own = share(count, ranks.rank(), ranks.count());
    let mut shown = progress(count, ranks.count());
    gather(ranks, |beat| {
        part(own, &mut |done, so_far| {
            beat()?;
            shown(done, so_far)
        })
    })
}

/// Shows how far work on `count` images is, which so many ranks share, until Ctrl-C is pressed.
fn progress(count: usize, ranks: usize) -> impl FnMut(usize, &str) -> ControlFlow<()> {
    let (mut bar, start) = (Bar::new(), Instant::now());
    move |done, so_far| {
        // The others are as far.
        let done = (done * ranks).min(count);
        bar.show(done as u64, count as u64, || {
            let speed = done as f64 / start.elapsed().as_secs_f64();
            format!("{done} of {count} images  {so_far}  {speed:.1} images/s")
        });
        interrupted()
    }
}
