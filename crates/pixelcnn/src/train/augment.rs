//! Conditioned augmentation (Jun et al., 2020): training images are transformed at random, and the
//! model is told how.

use std::ops::Range;

use pixelcnn_core::ModelConfig;
use rand::RngExt;

use crate::random::{Purpose, generator};

/// The numbers of the transformations of a step's images with these places in the batch; none where
/// the model is told of none.
pub(super) fn draw(config: &ModelConfig, seed: u64, step: u64, images: Range<usize>) -> Vec<u8> {
    let count = config.augmentation.count() as u8;
    if count == 0 {
        return Vec::new();
    }
    let mut random = generator(seed, Purpose::Augmentation, step);
    let drawn = (0..images.end).map(|_| random.random_range(0..=count));
    drawn.skip(images.start).collect()
}

/// Transforms images in place, each as its number says.
pub(super) fn apply(config: &ModelConfig, numbers: &[u8], images: &mut [u8]) {
    let images = images.chunks_exact_mut(config.bytes_per_image());
    for (image, &number) in images.zip(numbers) {
        if number > 0 {
            let transformed = transformed(config, number, image);
            image.copy_from_slice(&transformed);
        }
    }
}

/// An image \[H, W, C\] under a transformation: 1 mirrors it left to right, 2 top to bottom, and 4
/// exchanges rows and columns first; others do several of these.
fn transformed(config: &ModelConfig, number: u8, image: &[u8]) -> Vec<u8> {
    let ModelConfig { height, width, .. } = *config;
    let bytes = config.bytes_per_pixel();
    let mut transformed = Vec::with_capacity(image.len());
    for y in 0..height {
        for x in 0..width {
            let y = if number & 2 > 0 { height - 1 - y } else { y };
            let x = if number & 1 > 0 { width - 1 - x } else { x };
            let [y, x] = if number & 4 > 0 { [x, y] } else { [y, x] };
            let pixel = (y * width + x) * bytes;
            transformed.extend_from_slice(&image[pixel..pixel + bytes]);
        }
    }
    transformed
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use pixelcnn_core::Augmentation;

    use super::*;

    fn config(augmentation: Augmentation, [height, width]: [usize; 2]) -> ModelConfig {
        ModelConfig {
            height,
            width,
            augmentation,
            ..ModelConfig::default()
        }
    }

    #[test]
    fn a_flip_mirrors_left_to_right() {
        let config = config(Augmentation::Flips, [4, 8]);
        let image: Vec<u8> = (0..96).collect();
        let mut flipped = [&image[..], &image].concat();
        apply(&config, &[1, 0], &mut flipped);
        assert_eq!(&flipped[..6], [21, 22, 23, 18, 19, 20]);
        assert_eq!(flipped[90..96], [75, 76, 77, 72, 73, 74]);
        assert_eq!(flipped[96..], image);
        apply(&config, &[1], &mut flipped);
        assert_eq!(flipped[..96], image);
    }

    /// The eight symmetries of a square, each of which keeps neighbours neighbours.
    #[test]
    fn no_two_symmetries_are_the_same() {
        let config = config(Augmentation::Symmetries, [4, 4]);
        let image: Vec<u8> = (0..48).collect();
        let all: HashSet<Vec<u8>> = (0..8).map(|n| transformed(&config, n, &image)).collect();
        assert_eq!(all.len(), 8);
        for image in &all {
            let pixels: Vec<[u8; 2]> = (image.chunks(3))
                .map(|p| [p[0] / 12, p[0] / 3 % 4])
                .collect();
            for (i, [y, x]) in pixels.iter().enumerate().filter(|(i, _)| i % 4 < 3) {
                let [v, u] = pixels[i + 1];
                assert_eq!(y.abs_diff(v) + x.abs_diff(u), 1);
            }
        }
        let quarter = transformed(&config, 5, &image);
        let half = transformed(&config, 5, &quarter);
        assert_eq!(half, transformed(&config, 3, &image));
        assert_eq!(transformed(&config, 3, &half), image);
    }

    #[test]
    fn all_are_drawn_as_often_and_by_place() {
        let config = config(Augmentation::Symmetries, [4, 4]);
        let numbers = draw(&config, 1, 7, 0..4000);
        for number in 0..8 {
            let count = numbers.iter().filter(|&&drawn| drawn == number).count();
            assert!((430..570).contains(&count), "{number}: {count}");
        }
        assert_eq!(draw(&config, 1, 7, 1000..1010), numbers[1000..1010]);
        assert_ne!(draw(&config, 1, 8, 0..4000), numbers);
        let flips = draw(&self::config(Augmentation::Flips, [4, 8]), 1, 7, 0..100);
        assert!(flips.iter().all(|number| *number < 2));
        assert!(draw(&ModelConfig::default(), 1, 7, 0..100).is_empty());
    }
}
