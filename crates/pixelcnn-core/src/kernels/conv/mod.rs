//! The shifted convolution (the original's `down_shifted_conv2d`, `down_right_shifted_conv2d`) and
//! its transpose, forward and backward, on channels-last maps.
//!
//! Nothing is copied into a padded or unrolled form: a register tile reads every pixel through a
//! pointer per tap, which for a pixel outside the map points to zeros (the indirect convolution;
//! Dukhan, 2019). Every sum is taken in an order that depends on the shapes alone, so results are
//! the same bits for any number of threads.

#[cfg(test)]
mod tests;
mod tile;
mod winograd;

use std::cell::RefCell;
use std::iter;
use std::ops::Range;

use rayon::prelude::*;

use super::simd::{self, Level};
use crate::engine::Precision;
use crate::network::Window;
use tile::Tiles;
use winograd::Winograd;

/// A convolution, or a transposed one, over a window.
///
/// Maps are \[n, h, w, channels\]; `size` is always the \[n, h, w\] of the finer map: the input, or
/// the output of a transposed one. The weight is \[taps, inputs, outputs\] for both kinds, the bias
/// \[outputs\]. The functions panic where a slice has not the length that its shape says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv {
    /// How the two maps lie over each other; outside of them is zero.
    pub window: Window,
    /// Reads the coarser map and writes the finer one.
    pub transposed: bool,
    /// Channels in.
    pub inputs: usize,
    /// Channels out.
    pub outputs: usize,
    /// What is multiplied: values as they are, or, with [`Precision::Bf16`], rounded after they are
    /// transformed. Without the [instructions](simd::has_bf16) that is slow.
    pub precision: Precision,
}

impl Conv {
    /// Height and width of the input and of the output, of which the finer one has these.
    pub fn sizes(&self, fine: [usize; 2]) -> [[usize; 2]; 2] {
        let coarse = fine.map(|n| n.div_ceil(self.window.stride));
        match self.transposed {
            true => [coarse, fine],
            false => [fine, coarse],
        }
    }

    /// Whether it reads rows above the one that it writes.
    pub fn reaches_up(&self) -> bool {
        !self.transposed && self.window.offset[0] > 0
    }

    /// Checks the length of a slice of weights: \[taps, inputs, outputs\].
    fn expect_weight(&self, what: &str, len: usize) {
        let [rows, columns] = self.window.kernel;
        expect_len(what, len, &[rows, columns, self.inputs, self.outputs]);
    }

    /// `out` = the convolution of `x`, or `out` += it.
    pub fn forward(
        &self,
        size: [usize; 3],
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        accumulate: bool,
        out: &mut [f32],
    ) {
        self.forward_below(0, size, x, weight, bias, accumulate, out);
    }

    /// As [`Self::forward`], where every image of `x` has `above` rows more than `size` says, those
    /// above: what the kernel reads there is not zero. So an image can be computed band by band.
    #[allow(clippy::too_many_arguments)]
    pub fn forward_below(
        &self,
        above: usize,
        size: [usize; 3],
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        accumulate: bool,
        out: &mut [f32],
    ) {
        self.forward_at(simd::level(), size, above, x, weight, bias, accumulate, out);
    }

    /// `dx` = the gradient for `x`, given `dy`, the one for the output; or `dx` += it.
    pub fn backward_input(
        &self,
        size: [usize; 3],
        dy: &[f32],
        weight: &[f32],
        accumulate: bool,
        dx: &mut [f32],
    ) {
        self.backward_input_at(simd::level(), size, dy, weight, accumulate, dx);
    }

    /// `dweight` and `dbias` = the gradients for weight and bias, given `dy`, the one for the
    /// output.
    pub fn backward_weight(
        &self,
        size: [usize; 3],
        x: &[f32],
        dy: &[f32],
        dweight: &mut [f32],
        dbias: &mut [f32],
    ) {
        self.backward_weight_at(simd::level(), size, x, dy, dweight, dbias);
    }

    #[allow(clippy::too_many_arguments)]
    fn forward_at(
        &self,
        level: Level,
        [n, h, w]: [usize; 3],
        above: usize,
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        accumulate: bool,
        out: &mut [f32],
    ) {
        let [from, to] = self.sizes([h, w]);
        let [up, left] = self.window.offset;
        assert!(
            above == 0 || self.reaches_up() && above <= up,
            "rows that the kernel reads"
        );
        let from = [from[0].saturating_add(above), from[1]];
        // Seen from those rows the kernel reaches up less far.
        let window = Window {
            offset: [up - above, left],
            ..self.window
        };
        let seen = Conv { window, ..*self };
        expect_len("x", x.len(), &[n, from[0], from[1], self.inputs]);
        expect_len("out", out.len(), &[n, to[0], to[1], self.outputs]);
        expect_len("bias", bias.len(), &[self.outputs]);
        self.expect_weight("weight", weight.len());
        if let Some(winograd) = Winograd::forward(&seen, [n, h, w]) {
            let winograd = winograd.below(above);
            winograd.run(level, x, weight, bias, accumulate, out);
            return;
        }
        let gather = Gather {
            phases: phases(&window, self.transposed, to),
            images: n,
            from,
            to,
            inputs: self.inputs,
            outputs: self.outputs,
            taps: self.window.taps(),
            flipped: false,
        };
        gather.run(
            Tiles::of(level, self.precision),
            x,
            weight,
            bias,
            accumulate,
            out,
        );
    }

    fn backward_input_at(
        &self,
        level: Level,
        [n, h, w]: [usize; 3],
        dy: &[f32],
        weight: &[f32],
        accumulate: bool,
        dx: &mut [f32],
    ) {
        let [to, from] = self.sizes([h, w]);
        expect_len("dy", dy.len(), &[n, from[0], from[1], self.outputs]);
        expect_len("dx", dx.len(), &[n, to[0], to[1], self.inputs]);
        self.expect_weight("weight", weight.len());
        if let Some(winograd) = Winograd::backward_input(self, [n, h, w]) {
            winograd.run(level, dy, weight, &[], accumulate, dx);
            return;
        }
        let gather = Gather {
            phases: phases(&self.window, !self.transposed, to),
            images: n,
            from,
            to,
            inputs: self.outputs,
            outputs: self.inputs,
            taps: self.window.taps(),
            flipped: true,
        };
        gather.run(
            Tiles::of(level, self.precision),
            dy,
            weight,
            &[],
            accumulate,
            dx,
        );
    }

    fn backward_weight_at(
        &self,
        level: Level,
        [n, h, w]: [usize; 3],
        x: &[f32],
        dy: &[f32],
        dweight: &mut [f32],
        dbias: &mut [f32],
    ) {
        let (inputs, outputs, taps) = (self.inputs, self.outputs, self.window.taps());
        let [from, to] = self.sizes([h, w]);
        expect_len("x", x.len(), &[n, from[0], from[1], inputs]);
        expect_len("dy", dy.len(), &[n, to[0], to[1], outputs]);
        expect_len("dbias", dbias.len(), &[outputs]);
        self.expect_weight("dweight", dweight.len());
        if outputs == 0 {
            return;
        }
        sum_pixels(dy, dbias);
        if let Some(winograd) = Winograd::forward(self, [n, h, w]) {
            winograd.backward_weight(level, x, dy, dweight);
            return;
        }

        let tiles = Tiles::of(level, self.precision);
        let panels = Panels::new(tiles, outputs);
        let rows = InputTiles::new(inputs, tiles);
        // A task has some weights to itself and sums them over all pixels: the order of the sum
        // does not depend on how the weights are shared out.
        let parts = (2 * rayon::current_num_threads())
            .div_ceil(taps)
            .min(rows.count);
        let dweight = SharedMap(dweight.as_mut_ptr());
        let task = |task: usize| {
            let (tap, part) = (task / parts, task % parts);
            let mut pairs = self.pairs([n, h, w], tap);
            let (mut xs, mut dys) = (Vec::new(), Vec::new());
            let own = rows.part(part, parts);
            with_scratch(tiles.words(PIXELS) * panels.width, |packed| {
                let mut accumulate = false;
                loop {
                    xs.clear();
                    dys.clear();
                    for (x_pixel, dy_pixel) in pairs.by_ref().take(PIXELS) {
                        xs.push(x[x_pixel * inputs..][..inputs].as_ptr());
                        dys.push(dy_pixel);
                    }
                    if accumulate && xs.is_empty() {
                        break;
                    }
                    let pack = |panel: usize| {
                        let (columns, vectors) = panels.get(panel);
                        let packed_rows = packed.chunks_exact_mut(vectors * tiles.lanes);
                        let pixel = |pixel: usize| &dy[pixel * outputs..][columns.clone()];
                        let pixels = dys.chunks(tiles.numbers);
                        for (i, (row, pixels)) in packed_rows.zip(pixels).enumerate() {
                            for ahead in dys
                                .iter()
                                .skip(i * tiles.numbers + AHEAD)
                                .take(tiles.numbers)
                            {
                                let ahead =
                                    dy.as_ptr().wrapping_add(ahead * outputs + columns.start);
                                tile::prefetch_all::<1>(ahead, columns.len());
                            }
                            let first = pixel(pixels[0]);
                            let second =
                                pixels.get(1).map_or(&tile::ZEROS[..], |next| pixel(*next));
                            // SAFETY: the machine has the level. A panel has no more columns than
                            // `ZEROS` values, and the row as many words.
                            unsafe {
                                let (first, second) = (first.as_ptr(), second.as_ptr());
                                (tiles.join)(first, second, columns.len(), row.as_mut_ptr());
                            }
                            row[columns.len()..].fill(0.0);
                        }
                        packed.as_ptr()
                    };
                    // SAFETY: the machine has the level. `xs` point to `inputs` channels each, and
                    // `packed` has a row for each of them. The weights of this tap lie inside
                    // `dweight`, and no other task has these rows of them.
                    unsafe {
                        let first = dweight.at(tap * inputs * outputs);
                        own.add_outer_products(&xs, &panels, pack, first, accumulate);
                    }
                    accumulate = true;
                }
            });
        };
        (0..taps * parts).into_par_iter().for_each(task);
    }

    /// The pixels of `x` and of the output that a tap joins, in order.
    fn pairs(
        &self,
        [n, h, w]: [usize; 3],
        tap: usize,
    ) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (fine, stride, transposed) = ([h, w], self.window.stride, self.transposed);
        let coarse = fine.map(|n| n.div_ceil(stride));
        let kernel = [tap / self.window.kernel[1], tap % self.window.kernel[1]];
        // The coarse pixels c for which c * stride + kernel - offset lies inside the finer map.
        let [rows, columns] = [0, 1].map(|axis| {
            let (kernel, offset) = (kernel[axis], self.window.offset[axis]);
            let first = offset.saturating_sub(kernel).div_ceil(stride);
            let end = (fine[axis] + offset)
                .saturating_sub(kernel)
                .div_ceil(stride);
            first..end.min(coarse[axis])
        });
        let [up, left] = self.window.offset;
        (0..n).flat_map(move |image| {
            let columns = columns.clone();
            rows.clone().flat_map(move |row| {
                let coarse = (image * coarse[0] + row) * coarse[1];
                let fine_row = row * stride + kernel[0] - up;
                let fine = (image * fine[0] + fine_row) * fine[1] + kernel[1];
                columns.clone().map(move |column| {
                    let (coarse, fine) = (coarse + column, fine + column * stride - left);
                    if transposed {
                        (coarse, fine)
                    } else {
                        (fine, coarse)
                    }
                })
            })
        })
    }
}

/// Pixels that a block of the weight's gradient sums in registers, so that a packed panel of them
/// stays in the first-level cache and all their channels in the second. It fixes the sum's order.
const PIXELS: usize = 128;
/// Pixels from the asking for memory to its use.
const AHEAD: usize = 12;
/// Pixel tiles that a task of a gather takes at most, so that what they read stays in the
/// second-level cache beside a panel of the weight.
const PIXEL_TILES: usize = 8;

/// Pixels of a map that see the same taps: all of them, or those of one remainder by the stride.
struct Phase {
    /// Rows and columns of such pixels.
    size: [usize; 2],
    /// The first one.
    first: [usize; 2],
    /// From one to the next, in the map written.
    stride: usize,
    /// From one to the next, in the map read.
    from_stride: usize,
    /// Their taps.
    taps: Vec<usize>,
    /// Where the first pixel's taps lie in the map read.
    shifts: Vec<[isize; 2]>,
}

/// How the pixels of the finer map of `size`, or of the coarser one, are gathered from the other.
fn phases(window: &Window, to_fine: bool, [h, w]: [usize; 2]) -> Vec<Phase> {
    let [_, kernel_w] = window.kernel;
    let offset = window.offset.map(|n| n as isize);
    let taps = (0..window.taps()).map(|tap| [tap / kernel_w, tap % kernel_w].map(|n| n as isize));
    if !to_fine {
        return vec![Phase {
            size: [h, w],
            first: [0, 0],
            stride: 1,
            from_stride: window.stride,
            taps: (0..window.taps()).collect(),
            shifts: taps.map(|[i, j]| [i - offset[0], j - offset[1]]).collect(),
        }];
    }
    let remainders = (0..window.stride).flat_map(|i| (0..window.stride).map(move |j| [i, j]));
    let phase = |first: [usize; 2]| {
        let stride = window.stride as isize;
        let [a, b] = first.map(|n| n as isize);
        let (taps, shifts) = taps
            .clone()
            .map(|[i, j]| [a + offset[0] - i, b + offset[1] - j])
            .enumerate()
            .filter(|(_, reach)| reach.iter().all(|n| n % stride == 0))
            .map(|(tap, reach)| (tap, reach.map(|n| n / stride)))
            .unzip();
        let count = |n: usize, first| n.saturating_sub(first).div_ceil(window.stride);
        Phase {
            size: [count(h, first[0]), count(w, first[1])],
            first,
            stride: window.stride,
            from_stride: 1,
            taps,
            shifts,
        }
    };
    remainders.map(phase).collect()
}

/// Checks that a slice has the length of a shape, whose product must not wrap round: unsafe code
/// relies on it.
fn expect_len(what: &str, len: usize, shape: &[usize]) {
    let size = shape
        .iter()
        .try_fold(1, |size: usize, n| size.checked_mul(*n));
    assert_eq!(Some(len), size, "length of {what} {shape:?}");
}

/// A map computed from another one, every pixel from some taps. The slices' lengths are checked
/// before.
struct Gather {
    phases: Vec<Phase>,
    images: usize,
    from: [usize; 2],
    to: [usize; 2],
    inputs: usize,
    outputs: usize,
    taps: usize,
    /// The weight is \[taps, outputs, inputs\].
    flipped: bool,
}

impl Gather {
    fn run(
        &self,
        tiles: &Tiles,
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        accumulate: bool,
        out: &mut [f32],
    ) {
        if out.is_empty() {
            return;
        }
        let words = tiles.words(self.inputs);
        if tiles.numbers == 1 || self.inputs == 0 {
            return self.run_on(tiles, x, weight, bias, accumulate, out);
        }
        with_scratch(x.len() / self.inputs * words, |rounded| {
            let values = x.par_chunks(PIXELS * self.inputs);
            let tasks = values.zip(rounded.par_chunks_mut(PIXELS * words));
            tasks.for_each(|(values, rounded)| {
                let pixels = values.chunks_exact(self.inputs);
                for (values, rounded) in pixels.zip(rounded.chunks_exact_mut(words)) {
                    // SAFETY: the machine has the level, and there is a word for `numbers` values.
                    unsafe { (tiles.round)(values.as_ptr(), values.len(), rounded.as_mut_ptr()) };
                }
            });
            self.run_on(tiles, rounded, weight, bias, accumulate, out);
        });
    }

    /// The same on the words of `x`, pixel by pixel.
    fn run_on(
        &self,
        tiles: &Tiles,
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        accumulate: bool,
        out: &mut [f32],
    ) {
        let (n, taps) = (self.images, self.taps);
        let outputs = self.outputs;
        let words = tiles.words(self.inputs);
        let panels = Panels::new(tiles, outputs);
        let padded_bias = panels.padded(bias);
        let zeros = vec![0.0; words];

        // Tiles of as even a number of pixels as can be, a few to a task.
        let pixels = |phase: &Phase| n * phase.size[0] * phase.size[1];
        let count = |phase| usize::div_ceil(pixels(phase), tiles.rows());
        let total: usize = self.phases.iter().map(count).sum();
        let most = (total / (4 * rayon::current_num_threads())).clamp(1, PIXEL_TILES);
        let tasks: Vec<(&Phase, Range<usize>)> = self
            .phases
            .iter()
            .flat_map(|phase| {
                let parts = count(phase).div_ceil(most);
                (0..parts).map(move |part| (phase, share(count(phase), part, parts)))
            })
            .collect();

        let out = SharedMap(out.as_mut_ptr());
        with_scratch(taps * words * panels.lanes(), |packed| {
            self.pack(tiles, &panels, weight, packed);
            let packed = &*packed;
            tasks.into_par_iter().for_each(|(phase, range)| {
                let tile = |tile| share(pixels(phase), tile, count(phase));
                let (mut rows, mut outs) = (Vec::new(), Vec::new());
                for tile in range.clone().map(tile) {
                    self.point(phase, tile, x, &zeros, &out, &mut rows, &mut outs);
                }
                for panel in 0..panels.count() {
                    let (columns, vectors) = panels.get(panel);
                    let weights = &packed[panel * panels.width * taps * words..];
                    let (mut rows, mut outs) = (&rows[..], &outs[..]);
                    for tile in range.clone().map(tile) {
                        // SAFETY: the machine has the level. `point` made the pointers for this
                        // tile; the panel has `taps` rows of `vectors` vectors for every word,
                        // and `columns` lie inside a pixel. No other task writes these pixels.
                        unsafe {
                            tiles.gather[vectors - 1][tile.len() - 1](
                                &phase.taps,
                                rows.as_ptr(),
                                words,
                                weights.as_ptr(),
                                padded_bias[panel * panels.width..].as_ptr(),
                                outs.as_ptr(),
                                columns.start,
                                columns.len(),
                                accumulate,
                            );
                        }
                        rows = &rows[tile.len() * phase.taps.len()..];
                        outs = &outs[tile.len()..];
                    }
                }
            });
        });
    }

    /// Appends, for a tile of pixels, pointers to what every tap reads, and to what is written.
    #[allow(clippy::too_many_arguments)]
    fn point(
        &self,
        phase: &Phase,
        pixels: Range<usize>,
        x: &[f32],
        zeros: &[f32],
        out: &SharedMap,
        rows: &mut Vec<*const f32>,
        outs: &mut Vec<*mut f32>,
    ) {
        let words = zeros.len();
        let [h, w] = phase.size;
        let place = |pixel| [pixel / w / h, pixel / w % h, pixel % w];
        // Counted on, for divisions would cost more than a tile of few channels.
        let next = |[image, i, j]: &[usize; 3]| {
            Some(match (i + 1 == h, j + 1 == w) {
                (true, true) => [image + 1, 0, 0],
                (false, true) => [*image, i + 1, 0],
                _ => [*image, *i, j + 1],
            })
        };
        let places = || iter::successors(Some(place(pixels.start)), next).take(pixels.len());
        for [up, left] in &phase.shifts {
            rows.extend(places().map(|[image, i, j]| {
                let y = (i * phase.from_stride).wrapping_add_signed(*up);
                let x_ = (j * phase.from_stride).wrapping_add_signed(*left);
                if y < self.from[0] && x_ < self.from[1] {
                    let pixel = (image * self.from[0] + y) * self.from[1] + x_;
                    x[pixel * words..][..words].as_ptr()
                } else {
                    zeros.as_ptr()
                }
            }));
        }
        // The last tap reads what no tile before has read.
        for row in &rows[rows.len() - pixels.len().min(rows.len())..] {
            tile::prefetch_all::<1>(*row, words);
        }
        outs.extend(places().map(|[image, i, j]| {
            let y = phase.first[0] + i * phase.stride;
            let x = phase.first[1] + j * phase.stride;
            out.at(((image * self.to[0] + y) * self.to[1] + x) * self.outputs)
        }));
    }

    /// Packs the weight by panels, as words: \[panel, tap, input, column\], zeros beyond the last column.
    fn pack(&self, tiles: &Tiles, panels: &Panels, weight: &[f32], packed: &mut [f32]) {
        let (inputs, outputs) = (self.inputs, self.outputs);
        let words = tiles.words(inputs);
        let panel_size = panels.width * self.taps * words;
        if panel_size == 0 {
            return;
        }
        let pack = |(panel, packed): (usize, &mut [f32])| {
            let (columns, vectors) = panels.get(panel);
            let width = vectors * panels.width / 2;
            let pack_tap = |weight: &[f32], packed: &mut [f32]| {
                if self.flipped {
                    for (lane, column) in columns.clone().enumerate() {
                        let row = &weight[column * inputs..][..inputs];
                        for (to, from) in packed[lane..].iter_mut().step_by(width).zip(row) {
                            *to = *from;
                        }
                    }
                    for row in packed.chunks_exact_mut(width) {
                        row[columns.len()..].fill(0.0);
                    }
                } else {
                    let rows = weight.chunks_exact(outputs);
                    for (to, from) in packed.chunks_exact_mut(width).zip(rows) {
                        to[..columns.len()].copy_from_slice(&from[columns.clone()]);
                        to[columns.len()..].fill(0.0);
                    }
                }
            };
            for (tap, packed) in packed.chunks_exact_mut(words * width).enumerate() {
                let weight = &weight[tap * inputs * outputs..][..inputs * outputs];
                if tiles.numbers == 1 {
                    pack_tap(weight, packed);
                    continue;
                }
                with_scratch(inputs * width, |exact| {
                    pack_tap(weight, exact);
                    // SAFETY: the machine has the level, and there is a word for two inputs.
                    unsafe { tiles.join_rows(exact, width, packed.as_mut_ptr()) };
                });
            }
        };
        packed.par_chunks_mut(panel_size).enumerate().for_each(pack);
    }
}

/// The tiles of a weight's gradient by rows, or some of them.
struct InputTiles<'t> {
    tiles: &'t Tiles,
    /// All rows.
    inputs: usize,
    /// All tiles that they are shared out to, and which of them these are.
    count: usize,
    range: Range<usize>,
}

impl<'t> InputTiles<'t> {
    fn new(inputs: usize, tiles: &'t Tiles) -> InputTiles<'t> {
        let count = inputs.div_ceil(tiles.rows());
        InputTiles {
            tiles,
            inputs,
            count,
            range: 0..count,
        }
    }

    /// Part `part` of `parts` of all of them.
    fn part(&self, part: usize, parts: usize) -> InputTiles<'t> {
        InputTiles {
            range: share(self.count, part, parts),
            ..*self
        }
    }

    /// Sums over up to [`PIXELS`] pixels the outer products of their channels `xs` with the panels
    /// that `panel` gives, and writes them to the gradient \[inputs, columns\] at `out`, or adds
    /// them to it.
    ///
    /// # Safety
    /// The machine has the tiles' level. `xs` point to `inputs` channels each; a panel has a row of words
    /// for each of them, or for two, until the next one is asked for. `out` has \[inputs, columns\] values, of which
    /// nobody else uses these tiles' rows.
    unsafe fn add_outer_products(
        &self,
        xs: &[*const f32],
        panels: &Panels,
        mut panel: impl FnMut(usize) -> *const f32,
        out: *mut f32,
        accumulate: bool,
    ) {
        let InputTiles { tiles, inputs, .. } = *self;
        let rows = |tile| share(inputs, tile, self.count);
        let first = rows(self.range.start).start;
        let channels = rows(self.range.end).start - first;
        let words = tiles.words(xs.len());
        // Each tile's channels together: read once from afar, then for every panel.
        with_scratch(words * channels, |packed| {
            let place = |rows: &Range<usize>| (rows.start - first) * words;
            for rows in self.range.clone().map(rows) {
                // SAFETY: the channels are there, and the tile has room for all pixels.
                unsafe {
                    let to = packed[place(&rows)..].as_mut_ptr();
                    tiles.pack[rows.len() - 1](xs, rows.start, to);
                }
            }
            for number in 0..panels.count() {
                let (columns, vectors) = panels.get(number);
                let panel = panel(number);
                for rows in self.range.clone().map(rows) {
                    // SAFETY: as the caller says; the tile's channels were packed above.
                    unsafe {
                        tiles.outer[vectors - 1][rows.len() - 1](
                            words,
                            packed[place(&rows)..].as_ptr(),
                            panel,
                            out.add(rows.start * panels.columns + columns.start),
                            panels.columns,
                            columns.len(),
                            accumulate,
                        );
                    }
                }
            }
        });
    }
}

/// Columns split into panels of two vectors, the last one of one vector where that is enough.
struct Panels {
    columns: usize,
    /// Two vectors.
    width: usize,
}

impl Panels {
    fn new(tiles: &Tiles, columns: usize) -> Panels {
        Panels {
            columns,
            width: 2 * tiles.lanes,
        }
    }

    fn count(&self) -> usize {
        self.columns.div_ceil(self.width)
    }

    /// Columns and number of vectors of a panel.
    fn get(&self, panel: usize) -> (Range<usize>, usize) {
        let first = panel * self.width;
        let columns = first..self.columns.min(first + self.width);
        let vectors = columns.len().div_ceil(self.width / 2);
        (columns, vectors)
    }

    /// A value for every column, or none at all, with zeros up to whole panels.
    fn padded(&self, values: &[f32]) -> Vec<f32> {
        let mut padded = vec![0.0; self.count() * self.width];
        padded[..values.len()].copy_from_slice(values);
        padded
    }

    /// All columns, rounded up to vectors.
    fn lanes(&self) -> usize {
        self.columns.next_multiple_of(self.width / 2)
    }
}

/// Part `part` of `parts` that share `0..total` as evenly as can be.
fn share(total: usize, part: usize, parts: usize) -> Range<usize> {
    total * part / parts..total * (part + 1) / parts
}

/// `sums` = the sum of all pixels of `map`, in an order that depends on its size alone.
fn sum_pixels(map: &[f32], sums: &mut [f32]) {
    let channels = sums.len();
    let add = |mut sums: Vec<f32>, pixel: &[f32]| {
        sums.iter_mut().zip(pixel).for_each(|(sum, x)| *sum += x);
        sums
    };
    let blocks: Vec<Vec<f32>> = map
        .par_chunks(PIXELS * channels)
        .map(|block| block.chunks_exact(channels).fold(vec![0.0; channels], add))
        .collect();
    let sum = blocks
        .iter()
        .fold(vec![0.0; channels], |sums, block| add(sums, block));
    sums.copy_from_slice(&sum);
}

/// A map that several threads write, each its own part.
struct SharedMap(*mut f32);

// SAFETY: what is written through it is checked where it is used: no two threads write the same.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    fn at(&self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

/// Lends `f` memory of `len` values, whatever they are, that the thread keeps for the next time.
fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        // More than one, for `f` may borrow again, or wait for other threads and meanwhile be
        // given another task of ours.
        static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
    }
    // From the start of a cache line, which vectors should not straddle.
    const LINE: usize = 64 / size_of::<f32>();
    let mut memory = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if memory.len() < len + LINE {
        memory = vec![0.0; len + LINE];
    }
    let first = memory.as_ptr().align_offset(64).min(LINE);
    let result = f(&mut memory[first..first + len]);
    SCRATCH.with_borrow_mut(|kept| kept.push(memory));
    result
}
