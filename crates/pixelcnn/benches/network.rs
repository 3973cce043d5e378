//! Images per second of training (forward, backward) and evaluation, on this machine's CPU:
//! `cargo bench -p pixelcnn --bench network [-- nr_filters nr_resnet batch]`.

use std::hint::black_box;
use std::time::Instant;

use pixelcnn::ModelConfig;
use pixelcnn::kernels::pointwise::Dropout;
use pixelcnn::model::{Batch, Network, draw_parameters};
use pixelcnn::network::Layout;

/// Median seconds of several calls, after one that warms up.
fn median(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut seconds: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[runs / 2]
}

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let sizes = match numbers[..] {
        [filters, resnet, batch] => vec![(filters, resnet, batch)],
        _ => vec![(32, 1, 16), (32, 2, 16), (160, 5, 8)],
    };
    println!("filters resnet batch   training images/s  GFLOP/s   evaluation images/s  GFLOP/s");
    for (nr_filters, nr_resnet, batch) in sizes {
        let config = ModelConfig {
            nr_filters,
            nr_resnet,
            ..ModelConfig::default()
        };
        let device = burn::tensor::Device::flex();
        let network = Network::new(&config, &draw_parameters(&config, 1), &device);
        let images: Vec<u8> = (0..batch * config.dims())
            .map(|i| (i * 7919 % 251) as u8)
            .collect();
        let images = Batch {
            images: &images,
            labels: &[],
        };
        let dropout = Some(Dropout { rate: 0.5, seed: 1 });
        let runs = if nr_filters > 100 { 3 } else { 15 };
        let training = median(runs, || {
            black_box(network.gradients(images, dropout));
        });
        let evaluation = median(runs, || {
            black_box(network.nats_per_image(images));
        });
        let flops = 2e-9 * Layout::new(&config).multiply_adds as f64 * batch as f64;
        println!(
            "{nr_filters:7} {nr_resnet:6} {batch:5} {:19.1} {:8.1} {:21.1} {:8.1}",
            batch as f64 / training,
            3.0 * flops / training,
            batch as f64 / evaluation,
            flops / evaluation,
        );
    }
}
