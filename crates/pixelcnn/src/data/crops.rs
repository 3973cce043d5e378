//! Crops: squares that are cut out of images at random places, anew in every epoch.

use rand::RngExt;
use rand_chacha::rand_core::Rng;

use crate::random::{Purpose, generator};

/// The crops of an epoch.
pub(super) struct Crops {
    side: usize,
    channels: usize,
    /// Of each image height, width, and how many crops those before it have.
    images: Vec<([usize; 2], usize)>,
    /// The crops of all.
    count: usize,
}

impl Crops {
    /// Crops of images of these sizes, of each as many as would cover it, whole ones alone. Gives how many
    /// images are too small for any.
    pub fn of(
        side: usize,
        channels: usize,
        sizes: impl Iterator<Item = [usize; 2]>,
    ) -> (Crops, usize) {
        let (mut images, mut count, mut smaller) = (Vec::new(), 0, 0);
        for size in sizes {
            images.push((size, count));
            let [height, width] = size;
            match height.min(width) < side.max(1) {
                true => smaller += 1,
                false => count += (height * width) / (side * side),
            }
        }
        let crops = Crops {
            side,
            channels,
            images,
            count,
        };
        (crops, smaller)
    }

    pub fn len(&self) -> usize {
        self.count
    }

    /// The image that a crop is of.
    pub fn picture(&self, crop: usize) -> usize {
        // The last one that begins at it or before; those without crops begin where the next one does.
        self.images.partition_point(|(_, before)| *before <= crop) - 1
    }

    /// Cuts a crop out of its image.
    pub fn cut(&self, seed: u64, epoch: u64, crop: usize, image: &[u8], out: &mut [u8]) {
        let ([height, width], _) = self.images[self.picture(crop)];
        let seed = generator(seed, Purpose::Crop, epoch).next_u64();
        let mut random = generator(seed, Purpose::Crop, crop as u64);
        let [top, left] = [height, width].map(|n| random.random_range(0..=n - self.side));
        let row = self.side * self.channels;
        for (y, out) in out.chunks_exact_mut(row).enumerate() {
            let start = ((top + y) * width + left) * self.channels;
            out.copy_from_slice(&image[start..start + row]);
        }
    }
}
