//! Crops: squares that are cut out of images at random places, anew in every epoch.

use std::borrow::Cow;
use std::ops::Range;

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

    /// Cuts a crop out of its image, of which `read` gives some rows.
    pub fn cut<'a, E>(
        &self,
        seed: u64,
        epoch: u64,
        crop: usize,
        read: impl FnOnce(usize, Range<usize>) -> Result<Cow<'a, [u8]>, E>,
        out: &mut [u8],
    ) -> Result<(), E> {
        let picture = self.picture(crop);
        let ([height, width], _) = self.images[picture];
        let seed = generator(seed, Purpose::Crop, epoch).next_u64();
        let mut random = generator(seed, Purpose::Crop, crop as u64);
        let [top, left] = [height, width].map(|n| random.random_range(0..=n - self.side));
        let rows = read(picture, top..top + self.side)?;
        let rows = rows.chunks_exact(width * self.channels);
        let [start, len] = [left, self.side].map(|n| n * self.channels);
        for (row, out) in rows.zip(out.chunks_exact_mut(len)) {
            out.copy_from_slice(&row[start..start + len]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::convert::Infallible;

    use super::*;

    /// Rows of an image whose pixels tell their place.
    fn rows(
        [height, width]: [usize; 2],
        rows: Range<usize>,
    ) -> Result<Cow<'static, [u8]>, Infallible> {
        assert!(rows.end <= height);
        let pixels = rows.flat_map(|y| (0..width).map(move |x| [y as u8, x as u8]));
        Ok(pixels.flatten().collect())
    }

    #[test]
    fn crops_lie_everywhere_in_their_images_and_move() {
        let sizes = [[9, 5], [2, 40], [4, 4], [3, 3], [8, 8]];
        let (crops, smaller) = Crops::of(4, 2, sizes.into_iter());
        assert_eq!((crops.len(), smaller), (2 + 1 + 4, 2));
        let pictures: Vec<usize> = (0..crops.len()).map(|crop| crops.picture(crop)).collect();
        assert_eq!(pictures, [0, 0, 2, 4, 4, 4, 4]);
        let mut places = HashSet::new();
        for epoch in 0..200 {
            for (crop, &picture) in pictures.iter().enumerate() {
                let mut out = vec![0; 4 * 4 * 2];
                let read = |wanted, range| {
                    assert_eq!(wanted, picture);
                    rows(sizes[picture], range)
                };
                let Ok(()) = crops.cut(7, epoch, crop, read, &mut out);
                let [top, left] = [out[0], out[1]];
                let here = (0..4).flat_map(|y| (0..4).map(move |x| [top + y, left + x]));
                assert_eq!(out, here.flatten().collect::<Vec<u8>>());
                places.insert((crop, top, left));
                let mut again = vec![0; out.len()];
                let Ok(()) = crops.cut(7, epoch, crop, read, &mut again);
                assert_eq!(again, out);
            }
        }
        // Of 9x5 twelve places, of 4x4 one, of 8x8 twenty-five.
        assert_eq!(places.len(), 2 * 12 + 1 + 4 * 25);
    }
}
