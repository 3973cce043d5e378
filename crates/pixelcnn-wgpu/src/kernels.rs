//! The kernels, as they are called: the files in `kernels/` say what each computes. What a kernel's file calls `arg`
//! are its arguments, and its arrays have the names that they have here.

use std::ops::Range;

use pixelcnn_core::Nonlinearity;
use pixelcnn_core::incremental::gpu::Work;
use pixelcnn_core::incremental::program::Tap;
use pixelcnn_core::network::Layer;

use crate::gpu::{Array, List};

/// Invocations of a workgroup: as many as every adapter takes.
const LANES: usize = 256;
/// Workgroups in a direction, at most.
const MOST: usize = 65_535;
/// Rows and columns of a tile of `product.wgsl`.
const TILE: usize = 64;
/// Multiply-adds of a single kernel, about and at most, and of kernels that are submitted together: none run for longer
/// than a driver bears.
pub(crate) const AT_A_TIME: u64 = 1 << 32;

/// What an array of a kernel holds, and what is done with it.
#[derive(Debug, Clone, Copy)]
enum Use {
    Read,
    Write,
    ReadNumbers,
    WriteNumbers,
}

/// A kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Its place among all.
    pub number: usize,
    pub name: &'static str,
    arrays: &'static [(&'static str, Use)],
    arguments: &'static [(&'static str, &'static str)],
    /// What comes before its own text.
    shared: &'static [&'static str],
    text: &'static str,
}

/// The whole text of a kernel.
pub(crate) fn source(kernel: &Kernel) -> String {
    let mut text = include_str!("kernels/common.wgsl").to_owned();
    text += "struct Arguments {\n";
    if kernel.is_of_values() {
        text += "    begin: u32,\n";
    }
    for (name, kind) in kernel.arguments {
        text += &format!("    {name}: {kind},\n");
    }
    text += "}\n@group(0) @binding(0) var<uniform> arg: Arguments;\n";
    for (number, (name, use_)) in kernel.arrays.iter().enumerate() {
        let (access, kind) = match use_ {
            Use::Read => ("read", "f32"),
            Use::Write => ("read_write", "f32"),
            Use::ReadNumbers => ("read", "u32"),
            Use::WriteNumbers => ("read_write", "u32"),
        };
        text += &format!(
            "@group(0) @binding({}) var<storage, {access}> {name}: array<{kind}>;\n",
            number + 1
        );
    }
    text += &kernel.shared.concat();
    text += kernel.text;
    if kernel.is_of_values() {
        text += "
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let at = arg.begin + id.x + id.y * groups.x * 256u;
    if at < arg.values { run(at); }
}
";
    }
    text
}

impl Kernel {
    /// Whether it is one that makes a value by each invocation, the first of its arguments being their number.
    fn is_of_values(&self) -> bool {
        !self.text.contains("fn main(")
    }
}

/// How much a call is.
pub(crate) enum Size {
    /// So many values, by an invocation each, with multiply-adds for each.
    Values(usize, u64),
    /// Workgroups, with the multiply-adds of all of them.
    Groups([u32; 3], u64),
}

/// So many values.
fn over(values: usize) -> Size {
    Size::Values(values, 1)
}

/// Workgroups of a row of so many, which may be more than a direction has: kernels find their place by x and y.
fn spread(groups: usize) -> [u32; 3] {
    let rows = groups.div_ceil(MOST).max(1);
    [groups.div_ceil(rows) as u32, rows as u32, 1]
}

impl List {
    /// Adds a kernel, in as many calls as it takes.
    fn call(&mut self, kernel: &'static Kernel, size: Size, arrays: &[&Array], arguments: &[u32]) {
        match size {
            Size::Groups(groups, cost) => self.push(kernel, groups, cost, arrays, arguments),
            Size::Values(values, cost) => {
                let most = (AT_A_TIME / cost.max(1)).max(LANES as u64) as usize;
                for begin in (0..values).step_by(most) {
                    let end = values.min(begin + most);
                    let own = [begin as u32, end as u32];
                    let groups = spread((end - begin).div_ceil(LANES));
                    let cost = cost * (end - begin) as u64;
                    self.push(
                        kernel,
                        groups,
                        cost,
                        arrays,
                        &[&own, &arguments[1..]].concat(),
                    );
                }
            }
        }
    }
}

/// An argument of a kernel, as it is given.
trait Argument {
    fn word(self) -> u32;
}

impl Argument for usize {
    fn word(self) -> u32 {
        self as u32
    }
}

impl Argument for bool {
    fn word(self) -> u32 {
        self.into()
    }
}

impl Argument for f32 {
    fn word(self) -> u32 {
        self.to_bits()
    }
}

macro_rules! kernels {
    ($(
        $name:ident($($array:ident: $use:ident),*; $($argument:ident: $type:ident = $kind:ident),*)
        [$($shared:literal),*];
    )*) => {
        #[allow(non_camel_case_types)]
        enum Number { $($name),* }

        impl Kernel {
            /// All kernels.
            pub const ALL: &[Kernel] = &[$(Kernel {
                number: Number::$name as usize,
                name: stringify!($name),
                arrays: &[$((stringify!($array), Use::$use)),*],
                arguments: &[$((stringify!($argument), stringify!($type))),*],
                shared: &[$(include_str!(concat!("kernels/", $shared, ".wgsl"))),*],
                text: include_str!(concat!("kernels/", stringify!($name), ".wgsl")),
            }),*];
        }

        /// How each kernel is called, by so many workgroups.
        mod calls {
            use super::{Argument, Array, Kernel, List, Number, Size};

            $(
                #[allow(clippy::too_many_arguments)]
                pub(super) fn $name(
                    list: &mut List,
                    size: Size,
                    $($array: &Array,)*
                    $($argument: $kind),*
                ) {
                    let kernel = &Kernel::ALL[Number::$name as usize];
                    list.call(kernel, size, &[$($array),*], &[$($argument.word()),*]);
                }
            )*
        }
    };
}

macro_rules! each {
    ($($name:ident($($array:ident),*; $($argument:ident: $kind:ident),*) $(costs $cost:expr)?;)*) => {
        $(
            /// A value by each invocation.
            #[allow(clippy::too_many_arguments)]
            pub(crate) fn $name(
                list: &mut List,
                $($array: &Array,)*
                values: usize,
                $($argument: $kind),*
            ) {
                let costs = [$($cost as u64,)? 1];
                let size = Size::Values(values, costs[0]);
                calls::$name(list, size, $($array,)* values, $($argument),*);
            }
        )*
    };
}

kernels! {
    images(levels: ReadNumbers, out: Write; values: u32 = usize, channels: u32 = usize, taken: u32 = usize) [];
    embed(
        levels: ReadNumbers, weight: Read, bias: Read, out: Write;
        values: u32 = usize, maps: u32 = usize, which: u32 = usize, codes: u32 = usize, outputs: u32 = usize
    ) [];
    embed_by_weight(
        levels: ReadNumbers, d_out: Read, d_weight: Write;
        values: u32 = usize, pixels: u32 = usize, maps: u32 = usize, which: u32 = usize, codes: u32 = usize,
        outputs: u32 = usize
    ) [];
    embed_by_bias(d_weight: Write, d_bias: Write; values: u32 = usize, codes: u32 = usize) [];
    bend(
        x: Read, bias_1: Read, bias_2: Read, drops: ReadNumbers, y: Write;
        values: u32 = usize, count: u32 = usize, first: u32 = usize, whole: u32 = usize, f: u32 = usize,
        biases: u32 = usize, dropping: u32 = bool, block: u32 = usize
    ) ["dropped"];
    bend_backward(
        x: Read, bias_1: Read, bias_2: Read, drops: ReadNumbers, dy: Read, dx: Write;
        values: u32 = usize, count: u32 = usize, first: u32 = usize, whole: u32 = usize, f: u32 = usize,
        biases: u32 = usize, dropping: u32 = bool, block: u32 = usize, accumulate: u32 = bool
    ) ["dropped"];
    gate(
        x: Read, c2: Read, bias: Read, hw: Read, conditions: ReadNumbers, y: Write;
        values: u32 = usize, channels: u32 = usize, pixels_per_image: u32 = usize, conditional: u32 = bool
    ) ["added"];
    gate_backward(
        dy: Read, bias: Read, hw: Read, conditions: ReadNumbers, c2: Write;
        values: u32 = usize, channels: u32 = usize, pixels_per_image: u32 = usize, conditional: u32 = bool
    ) ["added"];
    hw_backward(
        d_c2: Read, conditions: ReadNumbers, d_hw: Write;
        values: u32 = usize, channels: u32 = usize, images: u32 = usize, pixels_per_image: u32 = usize
    ) [];
    shift(
        given: Read, to: Write;
        values: u32 = usize, h: u32 = usize, w: u32 = usize, channels: u32 = usize, down: u32 = usize,
        right: u32 = usize
    ) [];
    shift_backward(
        dy: Read, dx: Write;
        values: u32 = usize, h: u32 = usize, w: u32 = usize, channels: u32 = usize, down: u32 = usize,
        right: u32 = usize, accumulate: u32 = bool
    ) [];
    add_bias(bias: Read, to: Write; values: u32 = usize, channels: u32 = usize) [];
    add(given: Read, to: Write; values: u32 = usize) [];
    copy(given: Read, to: Write; values: u32 = usize) [];
    concat(given: Read, to: Write; values: u32 = usize, count: u32 = usize, first: u32 = usize, whole: u32 = usize) [];
    concat_backward(
        dy: Read, dx: Write;
        values: u32 = usize, count: u32 = usize, first: u32 = usize, whole: u32 = usize, accumulate: u32 = bool
    ) [];
    elu(x: Read, y: Write; values: u32 = usize) [];
    elu_backward(x: Read, dy: Read, dx: Write; values: u32 = usize, accumulate: u32 = bool) [];
    attend(
        queries: Read, keys_values: Read, seen: Write;
        values: u32 = usize, pixels: u32 = usize, channels: u32 = usize, heads: u32 = usize
    ) ["attention"];
    attend_by_queries(
        queries: Read, keys_values: Read, d_seen: Read, d_queries: Write, totals: Write;
        values: u32 = usize, pixels: u32 = usize, channels: u32 = usize, heads: u32 = usize, accumulate: u32 = bool
    ) ["attention"];
    attend_by_keys_values(
        queries: Read, keys_values: Read, d_seen: Read, totals: Read, d_keys_values: Write;
        values: u32 = usize, pixels: u32 = usize, channels: u32 = usize, heads: u32 = usize, accumulate: u32 = bool
    ) ["attention"];
    likelihood(
        levels: ReadNumbers, logits: Read, nats: Write, gradient: Write;
        values: u32 = usize, channels: u32 = usize, components: u32 = usize, by_logits: u32 = bool
    ) [];
    likelihood_of_codes(
        levels: ReadNumbers, logits: Read, nats: Write, gradient: Write;
        values: u32 = usize, maps: u32 = usize, codes: u32 = usize, by_logits: u32 = bool
    ) [];
    convolve(
        fine: Read, weight: Read, coarse: Write;
        images: u32 = usize, coarse_h: u32 = usize, coarse_w: u32 = usize, coarse_c: u32 = usize,
        fine_h: u32 = usize, fine_w: u32 = usize, fine_c: u32 = usize, kernel_h: u32 = usize,
        kernel_w: u32 = usize, offset_y: u32 = usize, offset_x: u32 = usize, stride: u32 = usize,
        accumulate: u32 = bool, group: u32 = usize
    ) ["geometry", "product"];
    transposed(
        coarse: Read, weight: Read, fine: Write;
        images: u32 = usize, coarse_h: u32 = usize, coarse_w: u32 = usize, coarse_c: u32 = usize,
        fine_h: u32 = usize, fine_w: u32 = usize, fine_c: u32 = usize, kernel_h: u32 = usize,
        kernel_w: u32 = usize, offset_y: u32 = usize, offset_x: u32 = usize, stride: u32 = usize,
        accumulate: u32 = bool, group: u32 = usize
    ) ["geometry", "product"];
    by_weight(
        fine: Read, coarse: Read, sums_of_parts: Write;
        images: u32 = usize, coarse_h: u32 = usize, coarse_w: u32 = usize, coarse_c: u32 = usize,
        fine_h: u32 = usize, fine_w: u32 = usize, fine_c: u32 = usize, kernel_h: u32 = usize,
        kernel_w: u32 = usize, offset_y: u32 = usize, offset_x: u32 = usize, stride: u32 = usize,
        part: u32 = usize, group: u32 = usize
    ) ["geometry", "product"];
    sum_pixels(
        d_to: Read, sums_of_parts: Write; pixels: u32 = usize, channels: u32 = usize, part: u32 = usize
    ) [];
    sum_parts(parts_of: Read, total: Write; values: u32 = usize, parts: u32 = usize) [];
    scales(
        v: Read, g: Read, scale: Write;
        rows: u32 = usize, outputs: u32 = usize, inner: u32 = usize, transposed: u32 = bool, floor: f32 = f32
    ) ["norm", "norm_sums", "total"];
    weights(
        v: Read, scale: Read, made: Write;
        values: u32 = usize, rows: u32 = usize, outputs: u32 = usize, inner: u32 = usize, transposed: u32 = bool,
        floor: f32 = f32
    ) ["norm"];
    scales_backward(
        v: Read, g: Read, d_weight: Read, d_g: Write, factors: Write;
        rows: u32 = usize, outputs: u32 = usize, inner: u32 = usize, transposed: u32 = bool, floor: f32 = f32
    ) ["norm", "norm_sums", "total"];
    weights_backward(
        v: Read, d_weight: Read, factors: Read, d_v: Write;
        values: u32 = usize, rows: u32 = usize, outputs: u32 = usize, inner: u32 = usize, transposed: u32 = bool,
        floor: f32 = f32
    ) ["norm"];
    find_wrong(values_of: Read, wrong: WriteNumbers; values: u32 = usize) [];
    adam(
        wrong: ReadNumbers, rates: Read, gradient: Read, parameter: Write, first: Write, second: Write,
        average: Write;
        values: u32 = usize
    ) [];
    muon_momentum(
        wrong: ReadNumbers, rates: Read, gradient: Read, first: Write, y: Write, squares: Write;
        values: u32 = usize, groups: u32 = usize, rows: u32 = usize, columns: u32 = usize
    ) ["total"];
    muon_scale(squares: Read, y: Write; values: u32 = usize, groups: u32 = usize, least_norm: f32 = f32) [];
    muon_gram(y: Read, gram: Write; shorter: u32 = usize, longer: u32 = usize) ["product"];
    muon_product(
        x: Read, factor: Read, out: Write;
        rows: u32 = usize, shorter: u32 = usize, scale: f32 = f32, by_product: f32 = f32
    ) ["product"];
    muon(
        wrong: ReadNumbers, rates: Read, y: Read, parameter: Write, average: Write;
        values: u32 = usize, rows: u32 = usize, columns: u32 = usize, length: f32 = f32
    ) [];
    sum_taps(
        memory: Write, weights: Read, rings: ReadNumbers, taps: ReadNumbers, labels: ReadNumbers, due: ReadNumbers;
        values: u32 = usize, images: u32 = usize, start: u32 = usize, class_bias: u32 = usize, scale: u32 = usize,
        channels: u32 = usize, panels: u32 = usize, gated: u32 = bool, first: u32 = usize, step: u32 = usize,
        begun: u32 = bool, complete: u32 = bool, weights_at: u32 = usize, first_tap: u32 = usize,
        end_tap: u32 = usize, inputs: u32 = usize, residual: u32 = usize, value: u32 = usize, bent_1: u32 = usize,
        f_1: u32 = usize, bent_2: u32 = usize, f_2: u32 = usize
    ) ["raster"];
    see(
        memory: Write, rings: ReadNumbers, due: ReadNumbers;
        values: u32 = usize, images: u32 = usize, start: u32 = usize, scale: u32 = usize, columns: u32 = usize,
        channels: u32 = usize, heads: u32 = usize, queries: u32 = usize, keys_values: u32 = usize
    ) ["raster"];
}

each! {
    images(levels, out; channels: usize, taken: usize);
    embed(levels, weight, bias, out; maps: usize, which: usize, codes: usize, outputs: usize);
    embed_by_weight(
        levels, d_out, d_weight; pixels: usize, maps: usize, which: usize, codes: usize, outputs: usize
    ) costs pixels;
    embed_by_bias(d_weight, d_bias; codes: usize) costs codes;
    shift(given, to; h: usize, w: usize, channels: usize, down: usize, right: usize);
    shift_backward(dy, dx; h: usize, w: usize, channels: usize, down: usize, right: usize, accumulate: bool);
    add_bias(bias, to; channels: usize);
    add(given, to;);
    copy(given, to;);
    elu(x, y;);
    elu_backward(x, dy, dx; accumulate: bool);
    attend(queries, keys_values, seen; pixels: usize, channels: usize, heads: usize)
        costs 8 * pixels * (channels / heads);
    attend_by_queries(
        queries, keys_values, d_seen, d_queries, totals;
        pixels: usize, channels: usize, heads: usize, accumulate: bool
    ) costs 8 * pixels * (channels / heads);
    attend_by_keys_values(
        queries, keys_values, d_seen, totals, d_keys_values;
        pixels: usize, channels: usize, heads: usize, accumulate: bool
    ) costs 8 * pixels * (channels / heads);
    gate(
        x, c2, bias, hw, conditions, y; channels: usize, pixels_per_image: usize, conditional: bool
    );
    gate_backward(
        dy, bias, hw, conditions, c2; channels: usize, pixels_per_image: usize, conditional: bool
    );
    hw_backward(d_c2, conditions, d_hw; channels: usize, images: usize, pixels_per_image: usize)
        costs images * pixels_per_image;
    likelihood(levels, logits, nats, gradient; channels: usize, components: usize, by_logits: bool)
        costs 100 * components;
    likelihood_of_codes(levels, logits, nats, gradient; maps: usize, codes: usize, by_logits: bool)
        costs 10 * codes;
    find_wrong(values_of, wrong;);
    adam(wrong, rates, gradient, parameter, first, second, average;);
    muon_scale(squares, y; groups: usize, least_norm: f32);
    muon(wrong, rates, y, parameter, average; rows: usize, columns: usize, length: f32);
    see(
        memory, rings, due;
        images: usize, start: usize, scale: usize, columns: usize, channels: usize, heads: usize,
        queries: usize, keys_values: usize
    );
}

/// A step of the incremental program.
pub(crate) struct TapsOf<'a> {
    pub work: Work<'a>,
    pub images: usize,
    /// Their numbers.
    pub taps: Range<usize>,
    /// Where their weights begin among the sum's.
    pub weights: usize,
    /// Rings of functions of the value, and the functions' numbers.
    pub bent: [Option<(usize, usize)>; 2],
}

/// In the place of what there is none of.
const NONE: usize = u32::MAX as usize;

#[allow(clippy::too_many_arguments)]
pub(crate) fn sum_taps(
    list: &mut List,
    memory: &Array,
    weights: &Array,
    rings: &Array,
    taps: &Array,
    labels: &Array,
    due: &Array,
    of: TapsOf,
) {
    let Work {
        sum,
        taps: read,
        first,
        step,
        count,
        begun,
        complete,
        ..
    } = of.work;
    let values = count * of.images * sum.channels;
    let inputs: usize = read.iter().map(Tap::channels).sum();
    let [(bent_1, f_1), (bent_2, f_2)] = of.bent.map(|bent| bent.unwrap_or((NONE, 0)));
    calls::sum_taps(
        list,
        Size::Values(values, (inputs * sum.halves()) as u64),
        memory,
        weights,
        rings,
        taps,
        labels,
        due,
        values,
        of.images,
        sum.start,
        sum.conditional.map_or(0, |_| sum.columns()),
        sum.scale,
        sum.channels,
        sum.panels(),
        sum.gated,
        first,
        step,
        begun,
        complete,
        of.weights,
        of.taps.start,
        of.taps.end,
        inputs,
        if sum.gated { sum.residual } else { NONE },
        sum.value.unwrap_or(NONE),
        bent_1,
        f_1,
        bent_2,
        f_2,
    );
}

/// A nonlinearity's number in `bend.wgsl`.
pub(crate) fn number(f: Nonlinearity) -> usize {
    match f {
        Nonlinearity::ConcatElu => 0,
        Nonlinearity::Elu => 1,
        Nonlinearity::Relu => 2,
    }
}

/// The channels of a map that is a part of a concatenation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Channels {
    pub count: usize,
    pub first: usize,
    pub of: usize,
}

/// What `bend` does beside bending.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bend<'a> {
    pub f: usize,
    pub channels: Channels,
    /// Added before: none, one or two.
    pub biases: &'a [&'a Array],
    /// The dropout of every block, and whose it is.
    pub dropout: Option<(&'a Array, usize)>,
}

impl Bend<'_> {
    /// In the place of what there is none of is what is there in any case.
    fn arrays<'a>(&'a self, x: &'a Array) -> [&'a Array; 3] {
        let bias = |number: usize| self.biases.get(number).copied().unwrap_or(x);
        let drops = self.dropout.map_or(x, |(drops, _)| drops);
        [bias(0), bias(1), drops]
    }

    /// Writes f of a map.
    pub fn forward(&self, list: &mut List, x: &Array, y: &Array, values: usize) {
        let Channels { count, first, of } = self.channels;
        let [bias_1, bias_2, drops] = self.arrays(x);
        let block = self.dropout.map_or(0, |(_, block)| block);
        calls::bend(
            list,
            over(values),
            x,
            bias_1,
            bias_2,
            drops,
            y,
            values,
            count,
            first,
            of,
            self.f,
            self.biases.len(),
            self.dropout.is_some(),
            block,
        );
    }

    /// The gradient by the map, from that by f of it.
    pub fn backward(
        &self,
        list: &mut List,
        [x, dy, dx]: [&Array; 3],
        values: usize,
        accumulate: bool,
    ) {
        let Channels { count, first, of } = self.channels;
        let [bias_1, bias_2, drops] = self.arrays(x);
        let block = self.dropout.map_or(0, |(_, block)| block);
        calls::bend_backward(
            list,
            over(values),
            x,
            bias_1,
            bias_2,
            drops,
            dy,
            dx,
            values,
            count,
            first,
            of,
            self.f,
            self.biases.len(),
            self.dropout.is_some(),
            block,
            accumulate,
        );
    }
}

/// Copies a map into a concatenation of which it is a part.
pub(crate) fn concat(list: &mut List, from: &Array, to: &Array, values: usize, channels: Channels) {
    let Channels { count, first, of } = channels;
    calls::concat(list, over(values), from, to, values, count, first, of);
}

/// The gradient by such a map.
pub(crate) fn concat_backward(
    list: &mut List,
    [dy, dx]: [&Array; 2],
    values: usize,
    channels: Channels,
    accumulate: bool,
) {
    let Channels { count, first, of } = channels;
    calls::concat_backward(
        list,
        over(values),
        dy,
        dx,
        values,
        count,
        first,
        of,
        accumulate,
    );
}

/// Two maps that lie over each other, and the window that joins them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    images: usize,
    /// Rows, columns and channels.
    coarse: [usize; 3],
    fine: [usize; 3],
    kernel: [usize; 2],
    offset: [usize; 2],
    stride: usize,
}

impl Geometry {
    /// Of a layer whose finer map has so many images, rows and columns.
    pub fn of(layer: &Layer, [images, h, w]: [usize; 3]) -> Geometry {
        let stride = layer.window.stride;
        let [coarse_h, coarse_w] = [h, w].map(|n| n.div_ceil(stride));
        Geometry {
            images,
            coarse: [coarse_h, coarse_w, layer.finer(layer.outputs, layer.inputs)],
            fine: [h, w, layer.finer(layer.inputs, layer.outputs)],
            kernel: layer.window.kernel,
            offset: layer.window.offset,
            stride,
        }
    }

    fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    fn coarse_pixels(&self) -> usize {
        self.images * self.coarse[0] * self.coarse[1]
    }

    fn fine_pixels(&self) -> usize {
        self.images * self.fine[0] * self.fine[1]
    }

    fn weights(&self) -> usize {
        self.taps() * self.coarse[2] * self.fine[2]
    }

    /// Pixels of a part of the coarser map, each of which has sums of the weight's gradient of its own: few
    /// enough for single precision, and so many that the parts take no more than an array may.
    fn part(&self) -> usize {
        const PIXELS: usize = 2048;
        const VALUES: usize = 1 << 24;
        let most = (VALUES / self.weights()).max(1);
        self.coarse_pixels().div_ceil(most).max(PIXELS)
    }

    fn parts(&self) -> usize {
        self.coarse_pixels().div_ceil(self.part())
    }

    /// Values of the sums of parts that the gradients by a layer's weight and bias are made of.
    pub fn partial(&self, layer: &Layer) -> usize {
        let pixels = self.coarse_pixels().max(self.fine_pixels());
        let of_bias = pixels.div_ceil(PIXELS_OF_BIAS) * layer.outputs;
        of_bias.max(self.parts() * self.weights())
    }

    /// Calls a product of so many rows and columns, and so deep, a few of its rows of tiles at a time.
    fn tiled(rows: usize, columns: usize, depth: usize, mut call: impl FnMut(Size, usize)) {
        let across = columns.div_ceil(TILE);
        let cost = (across * TILE * TILE * depth.max(1)) as u64;
        let most = (AT_A_TIME / cost).clamp(1, MOST as u64) as usize;
        let all = rows.div_ceil(TILE);
        for first in (0..all).step_by(most) {
            let down = most.min(all - first);
            let groups = [across as u32, down as u32, 1];
            call(Size::Groups(groups, cost * down as u64), first);
        }
    }

    /// `coarse` = the convolution of `fine`, or `coarse` += it.
    pub fn convolve(&self, list: &mut List, [fine, weight, coarse]: [&Array; 3], accumulate: bool) {
        let [coarse_h, coarse_w, coarse_c] = self.coarse;
        let [fine_h, fine_w, fine_c] = self.fine;
        let ([kernel_h, kernel_w], [offset_y, offset_x]) = (self.kernel, self.offset);
        let depth = self.taps() * fine_c;
        Geometry::tiled(self.coarse_pixels(), coarse_c, depth, |size, group| {
            calls::convolve(
                list,
                size,
                fine,
                weight,
                coarse,
                self.images,
                coarse_h,
                coarse_w,
                coarse_c,
                fine_h,
                fine_w,
                fine_c,
                kernel_h,
                kernel_w,
                offset_y,
                offset_x,
                self.stride,
                accumulate,
                group,
            );
        });
    }

    /// `fine` = the transposed convolution of `coarse`, or `fine` += it.
    pub fn transposed(
        &self,
        list: &mut List,
        [fine, weight, coarse]: [&Array; 3],
        accumulate: bool,
    ) {
        let [coarse_h, coarse_w, coarse_c] = self.coarse;
        let [fine_h, fine_w, fine_c] = self.fine;
        let ([kernel_h, kernel_w], [offset_y, offset_x]) = (self.kernel, self.offset);
        let depth = self.taps() * coarse_c;
        Geometry::tiled(self.fine_pixels(), fine_c, depth, |size, group| {
            calls::transposed(
                list,
                size,
                coarse,
                weight,
                fine,
                self.images,
                coarse_h,
                coarse_w,
                coarse_c,
                fine_h,
                fine_w,
                fine_c,
                kernel_h,
                kernel_w,
                offset_y,
                offset_x,
                self.stride,
                accumulate,
                group,
            );
        });
    }

    /// The gradient by the weight, given the two maps, one of which is a gradient itself; `partial` has room for
    /// the sums of parts.
    pub fn by_weight(
        &self,
        list: &mut List,
        [fine, d_weight, coarse]: [&Array; 3],
        partial: &Array,
    ) {
        let [coarse_h, coarse_w, coarse_c] = self.coarse;
        let [fine_h, fine_w, fine_c] = self.fine;
        let ([kernel_h, kernel_w], [offset_y, offset_x]) = (self.kernel, self.offset);
        let (part, parts) = (self.part(), self.parts());
        let tiles = [self.taps() * fine_c, coarse_c].map(|side| side.div_ceil(TILE));
        let cost = (tiles[0] * tiles[1] * TILE * TILE * part) as u64;
        let most = (AT_A_TIME / cost).clamp(1, MOST as u64) as usize;
        for group in (0..parts).step_by(most) {
            let deep = most.min(parts - group);
            let groups = [tiles[0] as u32, tiles[1] as u32, deep as u32];
            calls::by_weight(
                list,
                Size::Groups(groups, cost * deep as u64),
                fine,
                coarse,
                partial,
                self.images,
                coarse_h,
                coarse_w,
                coarse_c,
                fine_h,
                fine_w,
                fine_c,
                kernel_h,
                kernel_w,
                offset_y,
                offset_x,
                self.stride,
                part,
                group,
            );
        }
        let values = self.weights();
        calls::sum_parts(list, over(values), partial, d_weight, values, parts);
    }
}

/// Pixels of a part whose sums the gradient by a bias is made of.
const PIXELS_OF_BIAS: usize = 512;

/// The gradient by a bias: the sums of `d_to` [pixels, channels] over the pixels.
pub(crate) fn by_bias(
    list: &mut List,
    d_to: &Array,
    d_bias: &Array,
    partial: &Array,
    [pixels, channels]: [usize; 2],
) {
    // No more parts than a direction has workgroups.
    let part = pixels.div_ceil(MOST).max(PIXELS_OF_BIAS);
    let parts = pixels.div_ceil(part);
    let groups = [channels.div_ceil(32) as u32, parts as u32, 1];
    let size = Size::Groups(groups, (pixels * channels) as u64);
    calls::sum_pixels(list, size, d_to, partial, pixels, channels, part);
    calls::sum_parts(list, over(channels), partial, d_bias, channels, parts);
}

/// How a layer's weight is normalised, for the kernels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    pub rows: usize,
    pub outputs: usize,
    pub inner: usize,
    pub transposed: bool,
    pub floor: f32,
}

impl Norm {
    fn values(&self) -> usize {
        self.rows * self.outputs * self.inner
    }

    /// Makes the weight, by a scale for each output.
    pub fn make(&self, list: &mut List, [v, g, scale, made]: [&Array; 4]) {
        let &Norm {
            rows,
            outputs,
            inner,
            transposed,
            floor,
        } = self;
        let size = Size::Groups(spread(outputs), self.values() as u64);
        calls::scales(
            list, size, v, g, scale, rows, outputs, inner, transposed, floor,
        );
        let values = self.values();
        calls::weights(
            list,
            over(values),
            v,
            scale,
            made,
            values,
            rows,
            outputs,
            inner,
            transposed,
            floor,
        );
    }

    /// The gradients by V and g, given that by the weight, by two factors for each output.
    pub fn backward(
        &self,
        list: &mut List,
        [v, g, d_weight]: [&Array; 3],
        factors: &Array,
        [d_v, d_g]: [&Array; 2],
    ) {
        let &Norm {
            rows,
            outputs,
            inner,
            transposed,
            floor,
        } = self;
        let size = Size::Groups(spread(outputs), self.values() as u64);
        calls::scales_backward(
            list, size, v, g, d_weight, d_g, factors, rows, outputs, inner, transposed, floor,
        );
        let values = self.values();
        calls::weights_backward(
            list,
            over(values),
            v,
            d_weight,
            factors,
            d_v,
            values,
            rows,
            outputs,
            inner,
            transposed,
            floor,
        );
    }
}

/// Workgroups that share a matrix's sum of squares.
pub(crate) const SUMMED: usize = 32;

/// A matrix that Muon moves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    /// The parameter's number.
    pub parameter: usize,
    pub rows: usize,
    pub columns: usize,
    pub length: f32,
}

impl Matrix {
    /// Values.
    pub fn values(&self) -> usize {
        self.rows * self.columns
    }

    /// Its longer and its shorter side.
    pub fn sides(&self) -> [usize; 2] {
        [self.rows.max(self.columns), self.rows.min(self.columns)]
    }

    /// What is to be made orthogonal, on its side where the matrix is wide.
    pub fn momentum(
        &self,
        list: &mut List,
        [wrong, rates, gradient]: [&Array; 3],
        [first, y, squares]: [&Array; 3],
    ) {
        calls::muon_momentum(
            list,
            Size::Groups([SUMMED as u32, 1, 1], self.values() as u64),
            wrong,
            rates,
            gradient,
            first,
            y,
            squares,
            self.values(),
            SUMMED,
            self.rows,
            self.columns,
        );
    }

    /// transposed Y * Y.
    pub fn gram(&self, list: &mut List, y: &Array, gram: &Array) {
        let [longer, shorter] = self.sides();
        let tiles = shorter.div_ceil(TILE) as u32;
        let cost = (shorter * shorter * longer) as u64;
        let size = Size::Groups([tiles, tiles, 1], cost);
        calls::muon_gram(list, size, y, gram, shorter, longer);
    }

    /// out = scale * x + by_product * x * factor, of so many rows.
    pub fn product(
        &self,
        list: &mut List,
        [x, factor, out]: [&Array; 3],
        rows: usize,
        [scale, by_product]: [f32; 2],
    ) {
        let [_, shorter] = self.sides();
        let groups = [shorter, rows].map(|side| side.div_ceil(TILE) as u32);
        let groups = [groups[0], groups[1], 1];
        let cost = (rows * shorter * shorter) as u64;
        let size = Size::Groups(groups, cost);
        calls::muon_product(list, size, x, factor, out, rows, shorter, scale, by_product);
    }
}
