//! How good a model is on images, with a bar.

use std::ops::ControlFlow;
use std::time::Instant;

use pixelcnn::data::Dataset;
use pixelcnn::evaluate::{Evaluation, evaluate};
use pixelcnn::network::Network;

use crate::terminal::{Bar, Result, interrupted};

/// Evaluates the first `count` images of a data set and shows how far it is.
pub fn measure(
    network: &Network,
    data: &Dataset,
    count: usize,
    batch_size: usize,
) -> Result<Evaluation> {
    Ok(evaluate(
        network,
        data,
        count,
        batch_size,
        &mut progress(count),
    )?)
}

/// Shows how far the evaluation of `count` images is, until Ctrl-C is pressed.
pub fn progress(count: usize) -> impl FnMut(&Evaluation) -> ControlFlow<()> {
    let (mut bar, start) = (Bar::new(), Instant::now());
    move |so_far| {
        let done = so_far.bits_per_dim.len();
        bar.show(done as u64, count as u64, || {
            let speed = done as f64 / start.elapsed().as_secs_f64();
            let mean = so_far.mean();
            format!("{done} of {count} images  {mean:.4} bits/dim  {speed:.1} images/s")
        });
        interrupted()
    }
}
