//! Pictures of any sizes, coded in strips: columns of a picture side by side, each some rows behind the one
//! to its left, of which it sees everything. A strip is coded tile by tile from above, each a stream of its
//! own: so all threads work on one large picture, on the way there and back, and what has come of a stream
//! can be decoded while the rest is still on its way.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use super::adaptive::Adaptation;
use super::frequencies::Frequencies;
use super::stream::{Decoder, Encoder};
use super::{Codec, CodecError, Pixel};
use crate::incremental::{EvaluatorError, LAG, Lane, Raster};
use crate::likelihood::{Mixture, from_level};
use crate::progress::go_on;

/// Rows of a tile.
pub const TILE: usize = 64;

/// What of a picture is one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cut {
    /// All of it: it is of the model's size.
    Whole,
    /// [`TILE`] rows of a strip of the model's width.
    Strips,
}

/// How pictures are coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coding {
    /// Its streams.
    pub cut: Cut,
    /// Whether what a picture has taught so far is taken into account, beside the network.
    pub adapts: bool,
}

impl Coding {
    /// Pictures of the model's size, by the network alone.
    pub const BY_NETWORK: Coding = Coding {
        cut: Cut::Whole,
        adapts: false,
    };
}

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

    /// Strips of so many columns that it has.
    pub fn strips(&self, columns: usize) -> usize {
        self.width.div_ceil(columns)
    }

    /// Tiles in strips of so many columns.
    pub fn count_tiles(&self, columns: usize) -> usize {
        self.strips(columns) * self.height.div_ceil(TILE)
    }

    /// Rows that go by until the last of its strips is done.
    pub fn rows(&self, columns: usize) -> usize {
        self.height + (self.strips(columns) - 1) * LAG
    }

    /// The tiles of strips of so many columns in the order in which they begin.
    pub fn tiles(&self, columns: usize) -> Vec<Tile> {
        let strips = 0..self.strips(columns);
        let bands = 0..self.height.div_ceil(TILE);
        let tiles = bands.flat_map(|band| strips.clone().map(move |strip| Tile { band, strip }));
        let mut tiles: Vec<Tile> = tiles.collect();
        tiles.sort_by_key(|tile| [tile.begins(), tile.strip]);
        tiles
    }
}

/// A tile of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// Which of its strip's, from above.
    pub band: usize,
    /// Its strip, from the left.
    pub strip: usize,
}

impl Tile {
    /// Rows that go by before its first one is coded.
    pub fn begins(&self) -> usize {
        self.band * TILE + self.strip * LAG
    }
}

/// A strip of one of the pictures.
struct Strip {
    picture: usize,
    shape: Shape,
    /// Its first column, and how many it has.
    first: usize,
    columns: usize,
    /// Rows of its tiles.
    tile: usize,
    lane: Lane,
}

impl Strip {
    /// All of a picture, as one tile.
    pub fn whole(picture: usize, shape: Shape) -> Strip {
        Strip {
            picture,
            shape,
            first: 0,
            columns: shape.width,
            tile: shape.height,
            lane: Lane {
                class: shape.class,
                ..Lane::default()
            },
        }
    }

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
    pub tiles: Vec<Vec<u8>>,
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
    pub levels: Vec<u8>,
    /// Whether all bytes so far were what an encoder gives.
    pub sound: bool,
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

    fn strips(&self, cut: Cut, shapes: &[Shape]) -> Vec<Strip> {
        let columns = self.columns();
        let mut strips: Vec<Strip> = Vec::new();
        for (picture, &shape) in shapes.iter().enumerate() {
            if cut == Cut::Whole {
                strips.push(Strip::whole(picture, shape));
                continue;
            }
            for strip in 0..shape.strips(columns) {
                let first = strip * columns;
                strips.push(Strip {
                    picture,
                    shape,
                    first,
                    columns: columns.min(shape.width - first),
                    tile: TILE,
                    lane: Lane {
                        start: strip * LAG,
                        rows: shape.height,
                        left: (strip > 0).then(|| strips.len() - 1),
                        class: shape.class,
                    },
                });
            }
        }
        strips
    }

    /// Encodes pictures, u8 \[H, W, channels\], all of them side by side: of each one stream, or those of its
    /// [tiles](Shape::tiles). `progress` is told the rows that are done of those that must be, and can stop it.
    ///
    /// # Errors
    /// As [`Codec::encode`].
    ///
    /// # Panics
    /// If the lengths disagree, if a whole picture is not of the model's size, or as
    /// [`Evaluator::begin_strips`](crate::incremental::Evaluator::begin_strips).
    pub fn encode_pictures(
        &self,
        coding: Coding,
        pictures: &[(Shape, &[u8])],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<Vec<u8>>>, CodecError> {
        let shapes: Vec<Shape> = pictures.iter().map(|(shape, _)| *shape).collect();
        for (shape, levels) in pictures {
            assert_eq!(levels.len(), shape.dims(), "levels of a picture");
        }
        let strips = self.strips(coding.cut, &shapes);
        let levels: Vec<&[u8]> = pictures.iter().map(|(_, levels)| *levels).collect();
        let raster = self.begin_strips(coding.cut, &strips)?;
        let mut coders = self.encode_strips(coding, raster, &strips, &levels, progress)?;
        if coding.cut == Cut::Whole {
            return Ok(coders.into_iter().map(|coder| coder.tiles).collect());
        }
        let mut streams: Vec<Vec<Vec<u8>>> = Vec::new();
        let mut first = 0;
        for shape in &shapes {
            let tiles = shape.tiles(self.columns()).into_iter();
            let stream =
                |tile: Tile| std::mem::take(&mut coders[first + tile.strip].tiles[tile.band]);
            streams.push(tiles.map(stream).collect());
            first += shape.strips(self.columns());
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
        coding: Coding,
        shapes: &[Shape],
        stream: &mut dyn FnMut(usize, usize) -> Option<Vec<u8>>,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<Option<Vec<u8>>>, CodecError> {
        let strips = self.strips(coding.cut, shapes);
        let raster = self.begin_strips(coding.cut, &strips)?;
        let coders = self.decode_strips(coding, raster, &strips, stream, progress)?;
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

    fn begin_strips(&self, cut: Cut, strips: &[Strip]) -> Result<Raster, CodecError> {
        let config = self.evaluator.config();
        EvaluatorError::unless_likelihood_of_images(config)?;
        if cut == Cut::Whole {
            let own = [config.height, config.width];
            let fits = |strip: &Strip| [strip.shape.height, strip.shape.width] == own;
            assert!(strips.iter().all(fits), "pictures of the model's size");
            let labels: Vec<u32> = strips.iter().map(|strip| strip.lane.class).collect();
            return Ok(self.evaluator.begin_at(self.level, &labels, self.threads)?);
        }
        let lanes: Vec<Lane> = strips.iter().map(|strip| strip.lane).collect();
        let ends = strips
            .iter()
            .map(|strip| strip.lane.start + strip.shape.height);
        let rows = ends.max().unwrap_or(0);
        Ok(self
            .evaluator
            .begin_strips(self.level, &lanes, self.threads, rows)?)
    }

    /// Encodes strips of pictures of these `levels`.
    fn encode_strips(
        &self,
        coding: Coding,
        raster: Raster,
        strips: &[Strip],
        levels: &[&[u8]],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<Encoding>, CodecError> {
        let new = |_: &Strip| Encoding {
            encoder: Encoder::new(),
            tiles: Vec::new(),
        };
        let code = |coder: &mut Encoding, strip: &Strip, at: usize, model: &Frequencies| {
            let level = levels[strip.picture][at];
            coder.encoder.encode(level, model);
            level
        };
        let begin = |_: &mut Encoding, _: &Strip| {};
        self.each_level(
            coding,
            raster,
            strips,
            new,
            progress,
            begin,
            Encoding::end_tile,
            code,
        )
    }

    /// Decodes strips; `stream` is as for [`Self::decode_pictures`].
    fn decode_strips(
        &self,
        coding: Coding,
        raster: Raster,
        strips: &[Strip],
        stream: &mut dyn FnMut(usize, usize) -> Option<Vec<u8>>,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<Decoding>, CodecError> {
        let new = |_: &Strip| Decoding {
            decoder: None,
            levels: Vec::new(),
            sound: true,
        };
        let pictures = strips.iter().map(|strip| strip.picture + 1).max();
        let mut numbers: Vec<usize> = vec![0; pictures.unwrap_or(0)];
        let begin = |coder: &mut Decoding, strip: &Strip| {
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
            coding,
            raster,
            strips,
            new,
            progress,
            begin,
            Decoding::end_tile,
            code,
        )
    }

    /// Goes through the levels of all strips: `begin` is called where a tile of a strip begins, in the order
    /// in which they do, `end` after its last pixel; `code` codes a level, given its place in the picture and
    /// its frequencies, and says what it is.
    #[allow(clippy::too_many_arguments)]
    fn each_level<T: Send>(
        &self,
        coding: Coding,
        mut raster: Raster,
        strips: &[Strip],
        new: impl Fn(&Strip) -> T,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
        mut begin: impl FnMut(&mut T, &Strip),
        end: impl Fn(&mut T),
        code: impl Fn(&mut T, &Strip, usize, &Frequencies) -> u8 + Sync,
    ) -> Result<Vec<T>, CodecError> {
        let mixture = Mixture::of(self.evaluator.config());
        let rows = raster.rows();
        let pixel = |strip: &Strip| Pixel {
            adaptation: coding
                .adapts
                .then(|| Adaptation::new(strip.columns, &strip.shape)),
            ..Pixel::default()
        };
        let coders = strips.iter().map(|strip| (new(strip), pixel(strip)));
        let mut coders: Vec<Mutex<(T, Pixel)>> = coders.map(Mutex::new).collect();
        while let Some([y, _]) = raster.position() {
            let each = |coders: &mut [Mutex<(T, Pixel)>],
                        f: &mut dyn FnMut(&mut T, &Strip, usize)| {
                for (coder, strip) in coders.iter_mut().zip(strips) {
                    if let Some(row) = strip.row(y) {
                        f(&mut unlocked(coder.get_mut()).0, strip, row);
                    }
                }
            };
            each(&mut coders, &mut |coder, strip, row| {
                if row.is_multiple_of(strip.tile) {
                    begin(coder, strip);
                }
            });
            // The strip to the left is some rows ahead, and still has this one.
            for (number, strip) in strips.iter().enumerate() {
                let (before, rest) = coders.split_at_mut(number);
                let (_, pixel) = unlocked(rest[0].get_mut());
                if let (Some(row), Some(adaptation)) = (strip.row(y), &mut pixel.adaptation) {
                    let left = strip
                        .lane
                        .left
                        .map(|left| &*unlocked(before[left].get_mut()));
                    adaptation.begin_row(row, left.and_then(|(_, left)| left.adaptation.as_ref()));
                }
            }
            raster.code_row(&|turn| {
                let strip = &strips[turn.image];
                let Some(row) = strip.inside(turn.pixel) else {
                    turn.outside = true;
                    return;
                };
                // Nobody else wants it: each image is one thread's.
                let (coder, pixel) = &mut *unlocked(coders[turn.image].lock());
                let Pixel {
                    known,
                    one,
                    frequencies,
                    first,
                    adaptation,
                } = pixel;
                let [_, column] = turn.pixel;
                let Shape {
                    width, channels, ..
                } = strip.shape;
                let place = (row * width + strip.first + column) * channels;
                for (channel, level) in turn.channels.clone().zip(&mut *turn.levels) {
                    if channel < channels {
                        mixture.next_channel(turn.logits, &known[..channel], one);
                        frequencies.set(one);
                        if let Some(adaptation) = adaptation {
                            adaptation.expect(column, channel, frequencies);
                        }
                        *level = code(coder, strip, place + channel, frequencies);
                        if let Some(adaptation) = adaptation {
                            adaptation.learn(column, channel, *level, frequencies);
                        }
                        if channel == 0 {
                            *first = *level;
                        }
                    } else {
                        *level = *first;
                    }
                    known[channel] = from_level(*level);
                }
            });
            each(&mut coders, &mut |coder, strip, row| {
                if row + 1 == strip.shape.height || (row + 1).is_multiple_of(strip.tile) {
                    end(coder);
                }
            });
            go_on(progress(y + 1, rows))?;
        }
        let coders = coders.into_iter();
        Ok(coders.map(|coder| unlocked(coder.into_inner()).0).collect())
    }
}

/// What a lock holds is whole whenever it can be had.
fn unlocked<T>(result: Result<T, PoisonError<T>>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}
