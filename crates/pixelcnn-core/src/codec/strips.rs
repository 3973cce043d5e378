//! Pictures of any sizes, coded in strips: columns of a picture side by side, each some rows behind the one
//! to its left, of which it sees everything. A strip is coded tile by tile from above, each a stream of its
//! own: so all threads work on one large picture, on the way there and back, and what has come of a stream
//! can be decoded while the rest is still on its way.

use std::ops::ControlFlow;

use rayon::prelude::*;

use super::frequencies::Frequencies;
use super::stream::{Decoder, Encoder};
use super::{Codec, CodecError, Pixel};
use crate::incremental::{EvaluatorError, LAG, Lane};
use crate::likelihood::{Mixture, from_level};
use crate::progress::go_on;

/// Rows of a tile.
pub const TILE: usize = 64;

/// What is known of a picture before it is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Channels: the model's, or 1 where all are the same, and the first one alone is coded.
    pub channels: usize,
    /// Its class; any value for an unconditional model.
    pub class: u32,
}

impl Shape {
    /// Levels of the picture.
    pub fn dims(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// The tiles of strips of so many columns in the order in which they begin, the band of rows and the
    /// strip of each.
    pub fn tiles(&self, columns: usize) -> Vec<[usize; 2]> {
        let strips = 0..self.width.div_ceil(columns);
        let bands = 0..self.height.div_ceil(TILE);
        let tiles = bands.flat_map(|band| strips.clone().map(move |strip| [band, strip]));
        let mut tiles: Vec<[usize; 2]> = tiles.collect();
        tiles.sort_by_key(|[band, strip]| [band * TILE + strip * LAG, *strip]);
        tiles
    }
}

/// A strip of one of the pictures.
struct Strip {
    picture: usize,
    shape: Shape,
    /// Its first column, and how many it has.
    first: usize,
    columns: usize,
    lane: Lane,
}

impl Strip {
    /// The row of the picture that a row of the raster is, if it is one.
    fn row(&self, y: usize) -> Option<usize> {
        let row = y.checked_sub(self.lane.start);
        row.filter(|row| *row < self.shape.height)
    }

    /// The row, where the raster's pixel lies in the strip.
    fn inside(&self, [y, x]: [usize; 2]) -> Option<usize> {
        self.row(y).filter(|_| x < self.columns)
    }
}

/// A strip that is being encoded: the tile's stream, and those that are done.
struct Encoding {
    encoder: Encoder,
    tiles: Vec<Vec<u8>>,
}

impl Encoding {
    fn end_tile(&mut self) {
        let encoder = std::mem::replace(&mut self.encoder, Encoder::new());
        self.tiles.push(encoder.finish());
    }
}

/// A strip that is being decoded.
struct Decoding {
    decoder: Option<Decoder>,
    /// Its rows, one after the other.
    levels: Vec<u8>,
    /// Whether all bytes so far were what an encoder gives.
    sound: bool,
}

impl Decoding {
    fn end_tile(&mut self) {
        self.sound &= self.decoder.take().is_some_and(Decoder::finish);
    }
}

impl Codec {
    /// Columns of a strip: the model's width.
    fn columns(&self) -> usize {
        self.evaluator.config().width
    }

    fn strips(&self, shapes: &[Shape]) -> Vec<Strip> {
        let columns = self.columns();
        let mut strips: Vec<Strip> = Vec::new();
        for (picture, &shape) in shapes.iter().enumerate() {
            for strip in 0..shape.width.div_ceil(columns) {
                let first = strip * columns;
                strips.push(Strip {
                    picture,
                    shape,
                    first,
                    columns: columns.min(shape.width - first),
                    lane: Lane {
                        start: strip * LAG,
                        left: (strip > 0).then(|| strips.len() - 1),
                        class: shape.class,
                    },
                });
            }
        }
        strips
    }

    /// Encodes pictures, u8 \[H, W, channels\], all of them side by side, in strips of the model's width:
    /// of each the streams of its [tiles](Shape::tiles). `progress` is told the rows that are done of those
    /// that must be, and can stop it.
    ///
    /// # Errors
    /// As [`Codec::encode`].
    ///
    /// # Panics
    /// If the lengths disagree, or as [`Evaluator::begin_strips`](crate::incremental::Evaluator::begin_strips).
    pub fn encode_pictures(
        &self,
        pictures: &[(Shape, &[u8])],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<Vec<u8>>>, CodecError> {
        let shapes: Vec<Shape> = pictures.iter().map(|(shape, _)| *shape).collect();
        for (shape, levels) in pictures {
            assert_eq!(levels.len(), shape.dims(), "levels of a picture");
        }
        let strips = self.strips(&shapes);
        let mut coders: Vec<Encoding> = Vec::new();
        coders.resize_with(strips.len(), || Encoding {
            encoder: Encoder::new(),
            tiles: Vec::new(),
        });
        let code = |coder: &mut Encoding, strip: &Strip, at: usize, model: &Frequencies| {
            let level = pictures[strip.picture].1[at];
            coder.encoder.encode(level, model);
            level
        };
        self.each_level(
            &strips,
            &mut coders,
            progress,
            |_, _, _| {},
            Encoding::end_tile,
            code,
        )?;
        let mut streams: Vec<Vec<Vec<u8>>> = Vec::new();
        let mut first = 0;
        for shape in &shapes {
            let tiles = shape.tiles(self.columns()).into_iter();
            let stream =
                |[band, strip]: [usize; 2]| std::mem::take(&mut coders[first + strip].tiles[band]);
            streams.push(tiles.map(stream).collect());
            first += shape.width.div_ceil(self.columns());
        }
        Ok(streams)
    }

    /// Decodes pictures, all of them side by side: u8 \[H, W, channels\], or `None` where the bytes are not
    /// what [`Self::encode_pictures`] gives for any. `stream` is asked for the stream of a picture's tile, by
    /// their numbers, when it is needed: for each picture in their order. Where it has none, the picture is
    /// lost, and the others are not.
    ///
    /// # Errors
    /// As [`Codec::decode`].
    ///
    /// # Panics
    /// As [`Self::encode_pictures`].
    pub fn decode_pictures(
        &self,
        shapes: &[Shape],
        stream: &mut dyn FnMut(usize, usize) -> Option<Vec<u8>>,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<Option<Vec<u8>>>, CodecError> {
        let strips = self.strips(shapes);
        let mut numbers: Vec<usize> = vec![0; shapes.len()];
        let mut coders: Vec<Decoding> = Vec::new();
        for _ in &strips {
            coders.push(Decoding {
                decoder: None,
                levels: Vec::new(),
                sound: true,
            });
        }
        let begin = |coder: &mut Decoding, strip: &Strip, _: usize| {
            let number = &mut numbers[strip.picture];
            let bytes = stream(strip.picture, *number);
            coder.decoder = bytes.map(|bytes| Decoder::new(&bytes));
            *number += 1;
        };
        let code = |coder: &mut Decoding, _: &Strip, _: usize, model: &Frequencies| {
            let decoder = coder.decoder.as_mut();
            let level = decoder.map_or(0, |decoder| decoder.decode(model));
            coder.levels.push(level);
            level
        };
        self.each_level(
            &strips,
            &mut coders,
            progress,
            begin,
            Decoding::end_tile,
            code,
        )?;
        let mut pictures: Vec<Option<Vec<u8>>> = Vec::new();
        pictures.extend(shapes.iter().map(|shape| Some(vec![0; shape.dims()])));
        for (strip, coder) in strips.iter().zip(coders) {
            let picture = &mut pictures[strip.picture];
            if !coder.sound {
                *picture = None;
            }
            let Some(levels) = picture else {
                continue;
            };
            let channels = strip.shape.channels;
            let rows = levels.chunks_exact_mut(strip.shape.width * channels);
            for (row, own) in rows.zip(coder.levels.chunks_exact(strip.columns * channels)) {
                row[strip.first * channels..][..own.len()].copy_from_slice(own);
            }
        }
        Ok(pictures)
    }

    /// Goes through the levels of all strips, a pixel of each at a time: `begin` is called where a tile of
    /// a strip begins, in the order in which they do, `end` after its last pixel; `code` codes a level, given
    /// its place in the picture and its frequencies, and says what it is.
    fn each_level<T: Send>(
        &self,
        strips: &[Strip],
        coders: &mut [T],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
        mut begin: impl FnMut(&mut T, &Strip, usize),
        end: impl Fn(&mut T),
        code: impl Fn(&mut T, &Strip, usize, &Frequencies) -> u8 + Sync,
    ) -> Result<(), CodecError> {
        let config = self.evaluator.config();
        EvaluatorError::unless_likelihood_of_images(config)?;
        let mixture = Mixture::of(config);
        let (output, channels) = (mixture.logits_per_pixel(), config.channels_together());
        let lanes: Vec<Lane> = strips.iter().map(|strip| strip.lane).collect();
        let ends = strips
            .iter()
            .map(|strip| strip.lane.start + strip.shape.height);
        let rows = ends.max().unwrap_or(0);
        let mut raster = self
            .evaluator
            .begin_strips(self.level, &lanes, self.threads, rows)?;
        let task = lanes.len().div_ceil(self.threads).max(1);
        let mut levels = vec![0; lanes.len() * channels];
        let mut pixels = vec![Pixel::default(); lanes.len()];
        let mut frequencies = vec![Frequencies::default(); lanes.len().div_ceil(task)];
        while let Some([y, x]) = raster.position() {
            let turn = raster.channels();
            if x == 0 && turn.start == 0 {
                for (coder, strip) in coders.iter_mut().zip(strips) {
                    if strip.row(y).is_some_and(|row| row.is_multiple_of(TILE)) {
                        begin(coder, strip, y);
                    }
                }
            }
            let tasks = coders.par_chunks_mut(task).zip(strips.par_chunks(task));
            let tasks = tasks.zip(raster.logits().par_chunks(task * output));
            let tasks = tasks.zip(levels.par_chunks_mut(task * channels));
            let tasks = tasks.zip(pixels.par_chunks_mut(task)).zip(&mut frequencies);
            tasks.for_each(
                |(((((coders, strips), logits), levels), pixels), frequencies)| {
                    let logits = logits.chunks_exact(output);
                    let due = logits.zip(levels.chunks_exact_mut(channels)).zip(pixels);
                    let due = coders.iter_mut().zip(strips).zip(due);
                    for ((coder, strip), ((logits, levels), pixel)) in due {
                        let Some(row) = strip.inside([y, x]) else {
                            continue;
                        };
                        let Shape {
                            width, channels, ..
                        } = strip.shape;
                        let place = (row * width + strip.first + x) * channels;
                        for (channel, level) in turn.clone().zip(levels) {
                            let Pixel { known, one, first } = pixel;
                            if channel < channels {
                                mixture.next_channel(logits, &known[..channel], one);
                                frequencies.set(one);
                                *level = code(coder, strip, place + channel, frequencies);
                                if channel == 0 {
                                    *first = *level;
                                }
                            } else {
                                *level = *first;
                            }
                            known[channel] = from_level(*level);
                        }
                    }
                },
            );
            raster.push_inside(&levels, |lane| strips[lane].inside([y, x]).is_some());
            if x + 1 == config.width && turn.end == config.channels {
                for (coder, strip) in coders.iter_mut().zip(strips) {
                    let last = |row: usize| {
                        row + 1 == strip.shape.height || (row + 1).is_multiple_of(TILE)
                    };
                    if strip.row(y).is_some_and(last) {
                        end(coder);
                    }
                }
                go_on(progress(y + 1, rows))?;
            }
        }
        Ok(())
    }
}
