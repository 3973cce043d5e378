//! The network as a list of sums, each over taps into the values of earlier ones: what must be
//! computed when a row begins, and what when its turn comes to a pixel.
//!
//! A tap's place alone decides that: one that reads a row above, or a value known for whole rows,
//! is summed for all of a row at once; the others (the pixel itself and the one to its left) when
//! the pixel is due. So the vertical stack turns out to advance by rows and the horizontal stack by
//! pixels, with half of its sums, and all that it takes from the vertical stack, done a row ahead.

use std::ops::Range;

use super::tile::PANEL;
use crate::config::{ModelConfig, Nonlinearity, halved};
use crate::network::{GatedResnet, Layer, LayerKind, Pass, Window, pixelcnn};

/// Columns of a map from which on they are summed in pairs.
const MIN_PAIRED: usize = 16;

/// The sums of a model and the memory that they need.
#[derive(Debug, Default)]
pub struct Program {
    /// In the order in which they are to be computed.
    pub sums: Vec<Sum>,
    /// Where values are kept; ring 0 holds the image, or the embedding of its codes.
    pub rings: Vec<Ring>,
    /// Ring of the embedding of the coarser map, which is given: all of it, with a row of zeros above and
    /// below.
    pub coarse: Option<usize>,
    /// The layers that embed codes, and those of the coarser map.
    pub embeddings: [Option<usize>; 2],
    /// Layers whose weights the taps use.
    pub layers: Vec<Layer>,
    /// Rings of the network's output, one for the channels of each turn.
    pub logits: Vec<usize>,
    /// Floats of memory for each image.
    pub floats: usize,
}

/// The latest rows of a map: \[rows, width + 2, images, channels\], one column of zeros on each
/// side.
#[derive(Debug)]
pub struct Ring {
    /// How often the map's resolution is halved.
    pub scale: usize,
    /// Channels of a pixel.
    pub channels: usize,
    /// Rows kept, the current one among them.
    pub rows: usize,
    /// Columns, without the zeros at the sides.
    pub width: usize,
    /// Where it starts in the memory of one image.
    pub start: usize,
    /// Ring of its pairs: for each pair of columns Winograd's transform of the two and their
    /// neighbours, \[4, channels\].
    pub pairs: Option<usize>,
}

/// A layer's outputs, or a few layers' outputs added up.
#[derive(Debug)]
pub struct Sum {
    /// How often the map's resolution is halved.
    pub scale: usize,
    /// Whether it is complete when a row begins.
    pub by_row: bool,
    /// Channels of the pixel itself that must be known.
    pub known_channels: usize,
    /// Pixels whose row and column have the same remainders by [`Sum::step`] have the same taps.
    pub phases: Vec<Phase>,
    /// 2 for what a transposed convolution makes, else 1.
    pub step: usize,
    /// Taps into rings of pairs, one for each row of a kernel of three columns: the sums of two
    /// neighbours come from four products instead of six (Winograd, 1980). They are known when a
    /// row begins, and summed before the others.
    pub pairs: Vec<Tap>,
    /// Channels of the value made of it.
    pub channels: usize,
    /// The second half is a gate for the first one.
    pub gated: bool,
    /// Layers whose biases are added.
    pub biases: Vec<usize>,
    /// Parameter that adds a bias for each class.
    pub conditional: Option<usize>,
    /// Where the sums \[width, images, columns\] are in the memory of one image.
    pub start: usize,
    /// Where the biases \[images, columns\] are, if conditional.
    pub bias_start: usize,
    /// Ring of the value that the gated sum is added to.
    pub residual: usize,
    /// Ring of the value.
    pub value: Option<usize>,
    /// Rings of functions of the value.
    pub activations: Vec<(Nonlinearity, usize)>,
    /// Whose outcome it is instead of taps.
    pub attention: Option<Attention>,
}

/// What each pixel sees of those up to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Among which the channels are shared out.
    pub heads: usize,
    /// Ring of the queries.
    pub queries: usize,
    /// Ring of the keys and the values: all rows of the map.
    pub keys_values: usize,
}

impl Sum {
    /// Panels of each half.
    pub fn panels(&self) -> usize {
        self.channels.div_ceil(PANEL)
    }

    /// 2 with a gate, else 1.
    pub fn halves(&self) -> usize {
        1 + usize::from(self.gated)
    }

    /// Floats of one pixel's sums, each half filled up to whole panels.
    pub fn columns(&self) -> usize {
        self.halves() * self.panels() * PANEL
    }

    /// The first of the phases that a row has; there are [`Sum::step`].
    fn first_phase(&self, row: usize) -> usize {
        row % self.step * self.step
    }
}

/// Taps known when a row begins, and those only known at the pixel.
#[derive(Debug, Default)]
pub struct Phase {
    /// Known when a row begins.
    pub row: Vec<Tap>,
    /// Known at the pixel.
    pub pixel: Vec<Tap>,
}

/// When taps are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// For all of a row, when it begins.
    Row,
    /// When it is the pixel's turn.
    Pixel,
}

impl Phase {
    /// Those that are summed then.
    pub fn taps(&self, when: When) -> &[Tap] {
        match when {
            When::Row => &self.row,
            When::Pixel => &self.pixel,
        }
    }
}

/// Where a sum reads: the pixel at the same place in the ring's resolution, moved by `dy` and `dx`.
#[derive(Debug, Clone)]
pub struct Tap {
    /// What it reads.
    pub ring: usize,
    /// Rows down.
    pub dy: isize,
    /// Columns to the right.
    pub dx: isize,
    /// The layer.
    pub layer: usize,
    /// The tap in its window, 0 for a dense layer.
    pub tap: usize,
    /// The layer's input channels that the ring's channels are, in order.
    pub inputs: [Range<usize>; 2],
    /// Adds the layer's bias to the weight of the last channel, which is the plane of ones.
    pub bias_on_ones: bool,
}

impl Tap {
    /// Channels read.
    pub fn channels(&self) -> usize {
        self.inputs.iter().map(Range::len).sum()
    }
}

impl Program {
    /// The program of a model, which must be valid; none where its memory can't be counted. With
    /// `pairs`, sums of whole rows go through Winograd's transform where that pays on a CPU.
    pub fn new(config: &ModelConfig, pairs: bool) -> Option<Program> {
        let mut compiler = Compiler {
            config,
            pairs,
            program: Program::default(),
        };
        let inputs = match config.nr_codes {
            0 => config.channels,
            _ => config.nr_filters,
        };
        compiler.ring(0, inputs + 1);
        let Map(logits) = pixelcnn(config, &mut compiler, Map(vec![Part::Image]));
        for part in logits {
            let (ring, ..) = compiler.source(&Map(vec![part]));
            compiler.program.logits.push(ring);
        }
        compiler.finish()
    }

    /// What must be summed for a row and column of the image once all pixels before are known, and as
    /// many of its own channels: if it begins a row, that row first.
    pub fn steps(&self, [y, x]: [usize; 2], known: usize) -> impl Iterator<Item = Step> {
        let due = |sum: &Sum, n: usize| n.is_multiple_of(1 << sum.scale);
        let sums = self.sums.iter().enumerate();
        let sums = sums.filter(move |(_, sum)| due(sum, y));
        let row = sums.clone().filter(move |_| x == 0 && known == 0);
        let row = row.flat_map(move |(number, sum)| {
            let first = sum.first_phase(y >> sum.scale);
            let phases = first..first + sum.step;
            let phases =
                phases.filter(|phase| !(sum.phases[*phase].row.is_empty() && sum.pairs.is_empty()));
            phases.map(move |phase| Step {
                sum: number,
                phase,
                when: When::Row,
            })
        });
        let now = move |sum: &Sum| !sum.by_row && sum.known_channels == known;
        let pixel = sums.filter(move |(_, sum)| now(sum) && due(sum, x));
        let pixel = pixel.map(move |(number, sum)| Step {
            sum: number,
            phase: sum.first_phase(y >> sum.scale) + (x >> sum.scale) % sum.step,
            when: When::Pixel,
        });
        row.chain(pixel)
    }
}

/// Taps to be summed.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// The sum's number.
    pub sum: usize,
    /// The phase's number.
    pub phase: usize,
    /// Which of its taps.
    pub when: When,
}

/// The channels of some values, one after the other.
#[derive(Debug, Clone)]
struct Map(Vec<Part>);

#[derive(Debug, Clone, Copy)]
enum Part {
    /// All of its channels, or the embedding of its codes, and a plane of ones.
    Image,
    /// The embedding of the coarser map, and a plane of ones.
    Coarse,
    /// Its first channels.
    FirstChannels(usize),
    /// The value of a sum.
    Value(usize),
    /// Its elu.
    Elu(usize),
}

struct Compiler<'a> {
    config: &'a ModelConfig,
    pairs: bool,
    program: Program,
}

impl Compiler<'_> {
    fn ring(&mut self, scale: usize, channels: usize) -> usize {
        self.program.rings.push(Ring {
            scale,
            channels,
            rows: 1,
            width: halved(self.config.width, scale),
            start: 0,
            pairs: None,
        });
        self.program.rings.len() - 1
    }

    fn sum(&mut self, scale: usize, step: usize, channels: usize) -> usize {
        self.program.sums.push(Sum {
            scale,
            by_row: false,
            known_channels: 0,
            phases: (0..step * step).map(|_| Phase::default()).collect(),
            step,
            pairs: Vec::new(),
            channels,
            gated: false,
            biases: Vec::new(),
            conditional: None,
            start: 0,
            bias_start: 0,
            residual: 0,
            value: None,
            activations: Vec::new(),
            attention: None,
        });
        self.program.sums.len() - 1
    }

    /// Gives a sum's value a ring.
    fn keep_value(&mut self, sum: usize) {
        let Sum {
            scale, channels, ..
        } = self.program.sums[sum];
        let ring = self.ring(scale, channels.next_multiple_of(PANEL));
        self.program.sums[sum].value = Some(ring);
    }

    /// The ring of a function of a sum's value, made where it is not there yet.
    fn activation(&mut self, sum: usize, f: Nonlinearity) -> usize {
        let found = self.program.sums[sum].activations.iter();
        if let Some((_, ring)) = found.clone().find(|(found, _)| *found == f) {
            return *ring;
        }
        let Sum {
            scale, channels, ..
        } = self.program.sums[sum];
        let ring = self.ring(scale, f.outputs(channels));
        self.program.sums[sum].activations.push((f, ring));
        ring
    }

    /// Ring, resolution and channels of a layer's input.
    fn source(&mut self, map: &Map) -> (usize, usize, usize) {
        let sums = &self.program.sums;
        match map.0[..] {
            [Part::Image] => (0, 0, self.program.rings[0].channels),
            [Part::Coarse] => {
                let ring = self.program.coarse.unwrap_or_default();
                (ring, 0, self.program.rings[ring].channels)
            }
            [Part::FirstChannels(channels)] => (0, 0, channels),
            [Part::Value(sum)] => (
                sums[sum].value.unwrap_or_default(),
                sums[sum].scale,
                sums[sum].channels,
            ),
            [Part::Elu(sum)] => {
                let (scale, channels) = (sums[sum].scale, sums[sum].channels);
                (self.activation(sum, Nonlinearity::Elu), scale, channels)
            }
            _ => unreachable!("only a block's projection reads a concatenation"),
        }
    }

    /// Adds the taps of a layer to a sum; all read `ring`, whose channels are the layer's `inputs`.
    fn taps(&mut self, sum: usize, layer: usize, ring: usize, inputs: [Range<usize>; 2]) {
        let Layer { kind, window, .. } = self.program.layers[layer];
        let [up, left] = window.offset.map(|n| n as isize);
        // The plane of ones is behind the channels.
        let given = ring == 0 || self.program.coarse == Some(ring);
        let ones = given && inputs[0].end == self.program.rings[ring].channels;
        let target = &mut self.program.sums[sum];
        let step = target.step as isize;
        for tap in 0..window.taps() {
            let [i, j] = [tap / window.kernel[1], tap % window.kernel[1]].map(|n| n as isize);
            for (phase, taps) in target.phases.iter_mut().enumerate() {
                let (dy, dx) = match kind {
                    LayerKind::Conv | LayerKind::Dense => (i - up, j - left),
                    LayerKind::Deconv => {
                        let [py, px] = [phase as isize / step, phase as isize % step];
                        let reach = [py + up - i, px + left - j];
                        if reach.iter().any(|reach| reach % step != 0) {
                            continue;
                        }
                        (reach[0] / step, reach[1] / step)
                    }
                };
                // Which of them are known when a row begins is seen in the end.
                taps.pixel.push(Tap {
                    ring,
                    dy,
                    dx,
                    layer,
                    tap,
                    inputs: inputs.clone(),
                    bias_on_ones: ones && window.offset == [i as usize, j as usize],
                });
            }
        }
        if !ones {
            target.biases.push(layer);
        }
    }

    /// Moves taps of a sum that goes by rows to pairs of columns, where its rows are wide enough
    /// that half as many pixels still make tiles.
    fn pair(sum: &mut Sum, rings: &mut Vec<Ring>, layers: &[Layer]) {
        let vertical = Window::down_shifted([2, 3], 1);
        for tap in std::mem::take(&mut sum.phases[0].row) {
            let &Ring {
                scale,
                channels,
                width,
                ..
            } = &rings[tap.ring];
            let fits = width >= MIN_PAIRED && width.is_multiple_of(2);
            if tap.ring == 0 || layers[tap.layer].window != vertical || !fits {
                sum.phases[0].row.push(tap);
            } else if tap.dx == 0 {
                let next = rings.len();
                let ring = *rings[tap.ring].pairs.get_or_insert(next);
                if ring == next {
                    rings.push(Ring {
                        scale,
                        channels: 4 * channels,
                        rows: 2,
                        width: width / 2,
                        start: 0,
                        pairs: None,
                    });
                }
                sum.pairs.push(Tap { ring, ..tap });
            }
        }
    }

    fn finish(mut self) -> Option<Program> {
        let program = &mut self.program;
        let mut row_by_row = vec![false; program.rings.len()];
        let mut known_channels = vec![0; program.rings.len()];
        if let Some(coarse) = program.coarse {
            row_by_row[coarse] = true;
        }
        for sum in &mut program.sums {
            sum.by_row = sum.attention.is_none();
            if let Some(attention) = sum.attention {
                let ring = &mut program.rings[attention.keys_values];
                ring.rows = halved(self.config.height, ring.scale);
            }
            for (i, phase) in sum.phases.iter_mut().enumerate() {
                // The lower of the rows that a coarser row covers begins when that is complete.
                let lower = i / sum.step > 0;
                let known = |tap: &Tap| tap.dy < 0 || lower || row_by_row[tap.ring];
                (phase.row, phase.pixel) = phase.pixel.drain(..).partition(known);
                for tap in phase.row.iter().chain(&phase.pixel) {
                    sum.by_row &= tap.dy < 0 || row_by_row[tap.ring];
                    let known = match (tap.ring, tap.dy, tap.dx) {
                        (0, 0, 0) => tap.channels(),
                        (ring, 0, 0) => known_channels[ring],
                        _ => 0,
                    };
                    sum.known_channels = sum.known_channels.max(known);
                }
            }
            if self.pairs && sum.by_row {
                Self::pair(sum, &mut program.rings, &program.layers);
            }
            let taps = sum
                .phases
                .iter()
                .flat_map(|phase| phase.row.iter().chain(&phase.pixel));
            for tap in taps {
                let rows = &mut program.rings[tap.ring].rows;
                *rows = (*rows).max(1 + tap.dy.unsigned_abs());
            }
            let rings = sum.activations.iter().map(|(_, ring)| *ring);
            for ring in rings.chain(sum.value) {
                row_by_row[ring] = sum.by_row;
                known_channels[ring] = sum.known_channels;
            }
        }

        if let Some(coarse) = program.coarse {
            program.rings[coarse].rows = self.config.height + 2;
        }

        // Unsafe code goes by these sizes: none may wrap round.
        let mut floats: usize = 0;
        let mut take = |shape: &[usize]| {
            let size = shape
                .iter()
                .try_fold(1, |size: usize, n| size.checked_mul(*n));
            let size = size?.checked_next_multiple_of(PANEL)?;
            let start = floats;
            floats = floats.checked_add(size)?;
            Some(start)
        };
        for ring in &mut program.rings {
            ring.start = take(&[ring.rows, ring.width + 2, ring.channels])?;
        }
        // Sums by row are done with at once and share their memory.
        let width = self.config.width;
        let shape = |sum: &Sum| [halved(width, sum.scale), sum.columns()];
        let rows = program.sums.iter().filter(|sum| sum.by_row).map(shape);
        let largest = rows.max_by_key(|[width, columns]| width.saturating_mul(*columns));
        let shared = take(&largest.unwrap_or_default())?;
        for sum in &mut program.sums {
            sum.start = match sum.by_row {
                true => shared,
                false => take(&shape(sum))?,
            };
            if sum.conditional.is_some() {
                sum.bias_start = take(&[sum.columns()])?;
            }
        }
        floats.checked_mul(size_of::<f32>())?;
        program.floats = floats;
        Some(self.program)
    }
}

impl Pass for Compiler<'_> {
    type Map = Map;

    fn append_ones(&mut self, x: &Map) -> Map {
        x.clone()
    }

    fn embed(&mut self, layer: &Layer, _x: &Map, map: usize) -> Map {
        self.program.embeddings[map] = Some(self.program.layers.len());
        self.program.layers.push(layer.clone());
        if map == 0 {
            return Map(vec![Part::Image]);
        }
        self.program.coarse = Some(self.ring(0, layer.outputs + 1));
        Map(vec![Part::Coarse])
    }

    fn first_channels(&mut self, _x: &Map, channels: usize) -> Map {
        Map(vec![Part::FirstChannels(channels)])
    }

    fn layer(&mut self, layer: &Layer, x: &Map) -> Map {
        let (ring, scale, channels) = self.source(x);
        let scale = layer.scale_of_output(scale);
        let step = match layer.kind {
            LayerKind::Conv | LayerKind::Dense => 1,
            LayerKind::Deconv => layer.window.stride,
        };
        let sum = self.sum(scale, step, layer.outputs);
        self.program.layers.push(layer.clone());
        let number = self.program.layers.len() - 1;
        self.taps(sum, number, ring, [0..channels, 0..0]);
        self.keep_value(sum);
        Map(vec![Part::Value(sum)])
    }

    fn gated_resnet(&mut self, block: &GatedResnet, x: &Map, a: Option<&Map>) -> Map {
        let [Part::Value(x)] = x.0[..] else {
            unreachable!("a block reads the value of one sum");
        };
        let (f, classes) = (self.config.nonlinearity, self.config.nr_classes);
        let (scale, filters) = (self.program.sums[x].scale, block.conv_1.outputs);
        let f_x = self.activation(x, f);
        let layers = [Some(&block.conv_1), block.nin.as_ref(), Some(&block.conv_2)];
        let [conv_1, nin, conv_2] = layers.map(|layer| {
            self.program.layers.extend(layer.cloned());
            self.program.layers.len() - 1
        });

        let c1 = self.sum(scale, 1, filters);
        self.taps(c1, conv_1, f_x, [0..f.outputs(filters), 0..0]);
        let parts = a.map_or(&[][..], |a| &a.0);
        for (i, part) in parts.iter().enumerate() {
            let Part::Value(part) = *part else {
                unreachable!("a block's auxiliary input are values of sums");
            };
            let f_a = self.activation(part, f);
            // A concatenated elu of a concatenation has the halves of each part apart.
            let inputs = match f {
                Nonlinearity::ConcatElu => [i, i + parts.len()],
                Nonlinearity::Elu | Nonlinearity::Relu => [i, i],
            };
            let mut inputs = inputs.map(|i| i * filters..(i + 1) * filters);
            if f != Nonlinearity::ConcatElu {
                inputs[1] = 0..0;
            }
            self.taps(c1, nin, f_a, inputs);
        }
        self.program.sums[c1].biases.dedup();
        let f_c1 = self.activation(c1, f);

        let c2 = self.sum(scale, 1, filters);
        self.taps(c2, conv_2, f_c1, [0..f.outputs(filters), 0..0]);
        let residual = self.program.sums[x].value.unwrap_or_default();
        let sum = &mut self.program.sums[c2];
        sum.gated = true;
        sum.residual = residual;
        // Images are drawn as they are: without an augmentation.
        sum.conditional = block.conditional.filter(|_| classes > 0);
        self.keep_value(c2);
        Map(vec![Part::Value(c2)])
    }

    /// The biases of the first layers ride on the plane of ones, which is 0 outside the image: so
    /// what comes in is zero, as it must.
    fn down_shift(&mut self, x: Map) -> Map {
        self.move_taps(x, -1, 0)
    }

    fn right_shift(&mut self, x: Map) -> Map {
        self.move_taps(x, 0, -1)
    }

    /// Of the first layers, `y` is the last.
    fn add(&mut self, x: Map, y: Map) -> Map {
        let ([Part::Value(sum)], [Part::Value(last)]) = (&x.0[..], &y.0[..]) else {
            unreachable!("values of sums are added");
        };
        debug_assert_eq!(last + 1, self.program.sums.len());
        if let Some(last) = self.program.sums.pop() {
            self.program.rings.pop();
            let sum = &mut self.program.sums[*sum];
            for (phase, more) in sum.phases.iter_mut().zip(last.phases) {
                phase.pixel.extend(more.pixel);
            }
        }
        x
    }

    fn concat(&mut self, x: &Map, y: &Map) -> Map {
        Map([&x.0[..], &y.0[..]].concat())
    }

    fn attention(&mut self, heads: usize, queries: &Map, keys_values: &Map) -> Map {
        let (queries, scale, channels) = self.source(queries);
        let (keys_values, ..) = self.source(keys_values);
        let sum = self.sum(scale, 1, channels);
        self.program.sums[sum].attention = Some(Attention {
            heads,
            queries,
            keys_values,
        });
        Map(vec![Part::Value(sum)])
    }

    fn elu(&mut self, x: Map) -> Map {
        let elu = |part: &Part| match *part {
            Part::Value(sum) => Part::Elu(sum),
            part => part,
        };
        Map(x.0.iter().map(elu).collect())
    }
}

impl Compiler<'_> {
    fn move_taps(&mut self, x: Map, dy: isize, dx: isize) -> Map {
        if let [Part::Value(sum)] = x.0[..] {
            let phases = &mut self.program.sums[sum].phases;
            for tap in phases.iter_mut().flat_map(|phase| &mut phase.pixel) {
                tap.dy += dy;
                tap.dx += dx;
            }
        }
        x
    }
}
