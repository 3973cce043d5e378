//! Lossless coding of images on top of the incremental evaluator: the likelier the model finds an
//! image, the fewer bytes it takes, log2 of its probability to within a byte.
//!
//! [Where it is wanted](Coding), a picture also teaches the codec while it is coded, so that it can take fewer
//! bytes than the network's likelihood.
//!
//! Each image has a stream of its own: pixels in raster order, a pixel's channels one after the
//! other, each value coded by the range coder with the frequencies that its mixture has given all
//! before it. Frequencies are the same numbers wherever they are computed, so what one machine
//! encodes, any other one decodes.

mod adaptive;
mod frequencies;
mod least_squares;
mod stream;
mod strips;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use crate::incremental::{Evaluator, EvaluatorError};
use crate::kernels::simd::Level;
use crate::likelihood::ChannelMixture;
use crate::progress::Stopped;
use adaptive::Adaptation;
use frequencies::Frequencies;
pub use strips::{Coding, Cut, Shape, TILE, Tile};

/// Why images are not coded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A class that the model does not have, or no memory.
    #[error(transparent)]
    Evaluator(#[from] EvaluatorError),
    /// `progress` said so.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Turns images into streams of bytes and back.
#[derive(Debug, Clone)]
pub struct Codec {
    /// The model; it must be the same both ways.
    pub evaluator: Evaluator,
    /// The vector instructions that it runs with; the bytes are the same with any.
    pub level: Level,
    /// Threads that it runs on; the bytes are the same with any number.
    pub threads: usize,
}

impl Codec {
    /// Encodes images, u8 \[N, H, W, C\] with the class of each in `labels` (any value for an
    /// unconditional model), all of them side by side: a stream for each. `progress` is told the
    /// rows that are done after each of them and can stop it.
    ///
    /// # Errors
    /// A class that the model does not have, no memory, or stopped.
    ///
    /// # Panics
    /// If the lengths disagree, or the machine does not have the vector instructions.
    pub fn encode(
        &self,
        labels: &[u32],
        images: &[u8],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<u8>>, CodecError> {
        let dims = self.evaluator.config().dims();
        assert_eq!(images.len(), labels.len() * dims, "a label for each image");
        let images = images.chunks_exact(dims);
        let pictures: Vec<(Shape, &[u8])> = self.shapes(labels).zip(images).collect();
        let mut rows = |done, _| progress(done);
        let streams = self.encode_pictures(Coding::BY_NETWORK, &pictures, &mut rows)?;
        Ok(streams.into_iter().map(|tiles| tiles.concat()).collect())
    }

    /// Decodes one image from each stream, all of them side by side: u8 \[H, W, C\], or `None` where
    /// the bytes are not what [`Self::encode`] gives for any image. Where they were damaged they may
    /// be so for another one: callers have to keep a checksum. `progress` is as for
    /// [`Self::encode`].
    ///
    /// # Errors
    /// A class that the model does not have, no memory, or stopped.
    ///
    /// # Panics
    /// If there is not a label for each stream, or the machine does not have the vector
    /// instructions.
    pub fn decode(
        &self,
        labels: &[u32],
        streams: &[&[u8]],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<Option<Vec<u8>>>, CodecError> {
        assert_eq!(streams.len(), labels.len(), "a label for each stream");
        let shapes: Vec<Shape> = self.shapes(labels).collect();
        let mut rows = |done, _| progress(done);
        let mut stream = |image: usize, _| Some(streams[image].to_vec());
        self.decode_pictures(Coding::BY_NETWORK, &shapes, &mut stream, &mut rows)
    }

    /// Images of the model's size.
    fn shapes(&self, labels: &[u32]) -> impl Iterator<Item = Shape> {
        let config = self.evaluator.config();
        labels.iter().map(|&class| Shape {
            height: config.height,
            width: config.width,
            channels: config.channels,
            class,
        })
    }
}

/// An image's pixel that is being coded.
#[derive(Debug, Clone, Default)]
struct Pixel {
    /// The values of its channels, as far as they are known.
    known: [f32; 3],
    /// The mixture of the channel before.
    one: ChannelMixture,
    /// That of the channel, as frequencies.
    frequencies: Frequencies,
    /// The first channel's level.
    first: u8,
    /// What the pixels before have taught, where it is taken into account.
    adaptation: Option<Adaptation>,
}
