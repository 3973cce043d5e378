//! How good a model is on images, with a bar.

use std::ops::{ControlFlow, Range};
use std::time::Instant;

use pixelcnn::data::Dataset;
use pixelcnn::evaluate::{Evaluation, evaluate};
use pixelcnn::network::Network;
use pixelcnn::ranks::{Ranks, gather, share};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::terminal::{Bar, Result, interrupted};

/// Evaluates the first `count` images of a data set, each rank its share, and shows how far it is;
/// rank 0 has all figures.
pub fn measure(
    ranks: &dyn Ranks,
    network: &Network,
    data: &Dataset,
    count: usize,
    batch_size: usize,
) -> Result<Evaluation> {
    let parts = share_out(ranks, count, |own, progress| {
        let mut progress = |so_far: &Evaluation| progress(so_far.bits_per_dim.len(), &mean(so_far));
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
