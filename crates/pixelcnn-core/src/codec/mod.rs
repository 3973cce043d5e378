//! Lossless coding of images on top of the incremental evaluator: the likelier the model finds an
//! image, the fewer bytes it takes, log2 of its probability to within a byte.
//!
//! Each image has a stream of its own: pixels in raster order, a pixel's channels one after the
//! other, each value coded by the range coder with the frequencies that its mixture has given all
//! before it. Frequencies are the same numbers wherever they are computed, so what one machine
//! encodes, any other one decodes.

mod frequencies;
mod stream;
mod strips;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use rayon::prelude::*;

use crate::incremental::{Evaluator, EvaluatorError};
use crate::kernels::simd::Level;
use crate::likelihood::{ChannelMixture, Mixture, from_level};
use crate::progress::{Stopped, go_on};
use frequencies::Frequencies;
use stream::{Decoder, Encoder};
pub use strips::{Shape, TILE};

/// Images whose pixels are worth a task of their own.
const TASK: usize = 16;

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
        let config = self.evaluator.config();
        EvaluatorError::unless_likelihood_of_images(config)?;
        let dims = config.dims();
        assert_eq!(images.len(), labels.len() * dims, "a label for each image");
        let images = images.chunks_exact(dims);
        let mut coders: Vec<_> = images.map(|image| (Encoder::new(), image)).collect();
        self.each_value(
            labels,
            &mut coders,
            progress,
            |(encoder, image), at, model| {
                encoder.encode(image[at], model);
                image[at]
            },
        )?;
        let streams = coders.into_iter().map(|(encoder, _)| encoder.finish());
        Ok(streams.collect())
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
        let config = self.evaluator.config();
        EvaluatorError::unless_likelihood_of_images(config)?;
        let dims = config.dims();
        assert_eq!(streams.len(), labels.len(), "a label for each stream");
        let streams = streams.iter();
        let mut coders: Vec<_> = streams
            .map(|stream| (Decoder::new(stream), Vec::with_capacity(dims)))
            .collect();
        self.each_value(
            labels,
            &mut coders,
            progress,
            |(decoder, image), _, model| {
                image.push(decoder.decode(model));
                image[image.len() - 1]
            },
        )?;
        let images = coders.into_iter();
        let images = images.map(|(decoder, image)| decoder.finish().then_some(image));
        Ok(images.collect())
    }

    /// Goes through the values of the images of all `coders`, a pixel of each at a time: `code`
    /// codes one, given its place in its image and its frequencies, and says what it is.
    fn each_value<T: Send>(
        &self,
        labels: &[u32],
        coders: &mut [T],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
        code: impl Fn(&mut T, usize, &Frequencies) -> u8 + Sync,
    ) -> Result<(), CodecError> {
        let config = self.evaluator.config();
        let mixture = Mixture::of(config);
        let (output, channels) = (mixture.logits_per_pixel(), config.channels_together());
        let mut raster = self.evaluator.begin_at(self.level, labels, self.threads)?;
        let mut levels = vec![0; labels.len() * channels];
        let mut pixels = vec![Pixel::default(); labels.len()];
        let mut frequencies = vec![Frequencies::default(); labels.len().div_ceil(TASK)];
        while let Some([y, x]) = raster.position() {
            let turn = raster.channels();
            let first = (y * config.width + x) * config.channels;
            let logits = raster.logits().par_chunks(TASK * output);
            let tasks = coders.par_chunks_mut(TASK).zip(logits);
            let tasks = tasks.zip(levels.par_chunks_mut(TASK * channels));
            let tasks = tasks.zip(pixels.par_chunks_mut(TASK)).zip(&mut frequencies);
            tasks.for_each(|((((coders, logits), levels), pixels), frequencies)| {
                let logits = logits.chunks_exact(output);
                let due = logits.zip(levels.chunks_exact_mut(channels)).zip(pixels);
                for (coder, ((logits, levels), pixel)) in coders.iter_mut().zip(due) {
                    for (channel, level) in turn.clone().zip(levels) {
                        let Pixel { known, one, .. } = pixel;
                        mixture.next_channel(logits, &known[..channel], one);
                        frequencies.set(one);
                        *level = code(coder, first + channel, frequencies);
                        known[channel] = from_level(*level);
                    }
                }
            });
            raster.push(&levels);
            if x + 1 == config.width && turn.end == config.channels {
                go_on(progress(y + 1))?;
            }
        }
        Ok(())
    }
}

/// An image's pixel that is being coded.
#[derive(Debug, Clone, Default)]
struct Pixel {
    /// The values of its channels, as far as they are known.
    known: [f32; 3],
    /// The mixture of the channel before.
    one: ChannelMixture,
    /// The first channel's level.
    first: u8,
}
