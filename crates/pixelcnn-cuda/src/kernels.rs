//! The kernels, as they are called. Addresses are of memory on the GPU, 0 where a kernel takes none;
//! the files in `kernels/` say what each computes.

use std::ptr;

use pixelcnn_core::Nonlinearity;
use pixelcnn_core::kernels::adam::Rates;
use pixelcnn_core::kernels::pointwise::Dropped;
use pixelcnn_core::network::Layer;

use crate::CudaError;
use crate::gpu::{Argument, Branch, Plain};

/// Their source, without what it begins with on a device.
pub(crate) const SOURCES: [&str; 8] = [
    include_str!("kernels/numbers.cu"),
    include_str!("kernels/pointwise.cu"),
    include_str!("kernels/convolution.cu"),
    include_str!("kernels/likelihood.cu"),
    include_str!("kernels/attention.cu"),
    include_str!("kernels/parameters.cu"),
    include_str!("kernels/muon.cu"),
    include_str!("kernels/raster.cu"),
];

/// Threads in a block.
const THREADS: u32 = 256;

/// Where something is on the GPU.
pub(crate) type Address = u64;

/// `Channels` of `kernels/pointwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Channels {
    pub count: i32,
    pub first: i32,
    pub of: i32,
}

/// `Biases` of `kernels/pointwise.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Biases {
    pub first: Address,
    pub second: Address,
}

/// `Added` of `kernels/pointwise.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Added {
    pub bias: Address,
    pub hw: Address,
    pub conditions: Address,
}

/// `Heads` of `kernels/attention.cu`: of attention over maps of so many pixels.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Heads {
    pub count: i64,
    pub pixels: i32,
    pub channels: i32,
    pub heads: i32,
}

/// `Geometry` of `kernels/convolution.cu`: rows, columns and channels of the coarser and the finer
/// map of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub(crate) struct Geometry {
    pub images: i32,
    pub coarse: [i32; 3],
    pub fine: [i32; 3],
    pub kernel: [i32; 2],
    pub offset: [i32; 2],
    pub stride: i32,
}

impl Geometry {
    /// Of a layer whose finer map has so many images, rows and columns.
    pub fn of(layer: &Layer, [images, h, w]: [usize; 3]) -> Geometry {
        let int = |n: usize| n as i32;
        let stride = layer.window.stride;
        let [coarse_h, coarse_w] = [h, w].map(|n| n.div_ceil(stride));
        let fine_channels = layer.finer(layer.inputs, layer.outputs);
        let coarse_channels = layer.finer(layer.outputs, layer.inputs);
        Geometry {
            images: int(images),
            coarse: [coarse_h, coarse_w, coarse_channels].map(int),
            fine: [h, w, fine_channels].map(int),
            kernel: layer.window.kernel.map(int),
            offset: layer.window.offset.map(int),
            stride: int(stride),
        }
    }

    /// Values of the coarser map.
    pub fn coarse_values(&self) -> i64 {
        i64::from(self.images) * self.coarse.map(i64::from).iter().product::<i64>()
    }

    /// Values of the finer map.
    pub fn fine_values(&self) -> i64 {
        i64::from(self.images) * self.fine.map(i64::from).iter().product::<i64>()
    }

    /// Values of the weight.
    pub fn weights(&self) -> i64 {
        let [kernel_h, kernel_w] = self.kernel.map(i64::from);
        kernel_h * kernel_w * i64::from(self.coarse[2]) * i64::from(self.fine[2])
    }
}

/// `Norm` of `kernels/parameters.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Norm {
    pub v: i64,
    pub g: i64,
    pub bias: i64,
    pub first: i64,
    pub wide: i64,
    pub transposed: i64,
    pub rows: i64,
    pub outputs: i64,
    pub inner: i64,
    pub floor: f64,
}

// SAFETY: ten numbers of eight bytes.
unsafe impl Plain for Norm {}

/// `Span` of `kernels/parameters.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Span {
    pub start: i64,
    pub count: i64,
}

// SAFETY: two numbers of eight bytes.
unsafe impl Plain for Span {}

/// `Matrix` of `kernels/muon.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Matrix {
    pub at: i64,
    pub rows: i64,
    pub columns: i64,
    pub length: f64,
}

// SAFETY: four numbers of eight bytes.
unsafe impl Plain for Matrix {}

/// `SUMMED` of `kernels/muon.cu`: blocks that sum the squares of a matrix.
pub(crate) const SUMMED: usize = 32;

// SAFETY: `Drop` of `kernels/pointwise.cu`: four numbers of four bytes.
unsafe impl Plain for Dropped {}

// SAFETY: `Rates` of `kernels/parameters.cu`: six numbers of four bytes.
unsafe impl Plain for Rates {}

/// `Ring` of `kernels/raster.cu`; none has no rows.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Ring {
    pub start: i64,
    pub scale: i32,
    pub channels: i32,
    pub rows: i32,
    pub width: i32,
}

/// `Tap` of `kernels/raster.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Tap {
    pub ring: Ring,
    pub dy: i32,
    pub dx: i32,
    pub channels: i32,
    pub unused: i32,
}

// SAFETY: numbers, and nothing between them.
unsafe impl Plain for Tap {}

/// `Sum` of `kernels/raster.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Sum {
    pub start: i64,
    pub bias: i64,
    pub class_bias: i32,
    pub scale: i32,
    pub width: i32,
    pub channels: i32,
    pub panels: i32,
    pub gated: i32,
    pub first: i32,
    pub step: i32,
    pub count: i32,
    pub begun: i32,
    pub complete: i32,
    pub weights: i64,
    pub taps: i32,
    pub inputs: i32,
    pub residual: Ring,
    pub value: Ring,
    pub bent: [Ring; 2],
    pub f: [i32; 2],
}

/// A nonlinearity's number in `kernels/pointwise.cu`.
pub(crate) fn number(f: Nonlinearity) -> i32 {
    match f {
        Nonlinearity::ConcatElu => 0,
        Nonlinearity::Elu => 1,
        Nonlinearity::Relu => 2,
    }
}

/// Blocks of [`THREADS`] for so many threads.
fn blocks(threads: i64) -> [u32; 3] {
    let blocks = threads.unsigned_abs().div_ceil(THREADS.into());
    [blocks.try_into().unwrap_or(u32::MAX), 1, 1]
}

/// Blocks of 32 columns.
fn columns(count: i64) -> u32 {
    let blocks = count.unsigned_abs().div_ceil(32);
    blocks.try_into().unwrap_or(u32::MAX)
}

/// Blocks of `TILE` rows or columns of `kernels/muon.cu`.
fn tiles(count: i64) -> u32 {
    let tiles = count.unsigned_abs().div_ceil(64);
    tiles.try_into().unwrap_or(u32::MAX)
}

/// Parts into which `sum_pixels` divides pixels, each with sums of its own.
pub(crate) fn chunks(pixels: i64) -> u32 {
    let chunks = pixels.unsigned_abs().div_ceil(512);
    chunks.try_into().unwrap_or(u32::MAX)
}

macro_rules! kernels {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) in $blocks:expr;)*) => {
        /// The names of all.
        pub(crate) const NAMES: &[&str] = &[$(stringify!($name)),*];

        $(
            /// Runs the kernel of this name.
            ///
            /// # Safety
            /// The memory at its addresses is as long as the numbers say.
            #[allow(clippy::too_many_arguments)]
            pub(crate) unsafe fn $name(
                branch: &dyn Branch,
                $($argument: $type),*
            ) -> Result<(), CudaError> {
                let blocks: [u32; 3] = $blocks;
                if blocks.contains(&0) {
                    return Ok(());
                }
                let arguments = [$(Argument {
                    at: ptr::from_ref(&$argument).cast_mut().cast(),
                    bytes: size_of_val(&$argument),
                }),*];
                // SAFETY: these are the kernel's arguments; the caller knows the memory.
                unsafe { branch.launch(stringify!($name), blocks, THREADS, &arguments) }
            }
        )*
    };
}

kernels! {
    fn images(levels: Address, out: Address, pixels: i64, channels: i32, taken: i32)
        in blocks(pixels * i64::from(taken));
    fn embed(
        images: Address,
        weight: Address,
        bias: Address,
        out: Address,
        pixels: i64,
        bytes: i32,
        which: i32,
        codes: i32,
        outputs: i32,
    ) in blocks(pixels * i64::from(outputs + 1));
    fn embed_by_weight(
        images: Address,
        d_out: Address,
        d_weight: Address,
        pixels: i64,
        bytes: i32,
        which: i32,
        codes: i32,
        outputs: i32,
    ) in blocks(i64::from(codes) * i64::from(outputs));
    fn embed_by_bias(d_weight: Address, d_bias: Address, codes: i32, outputs: i32)
        in blocks(outputs.into());
    fn bend_wide(
        x: Address,
        biases: Biases,
        drop: Address,
        y: Address,
        values: i64,
        channels: Channels,
        f: i32,
    ) in blocks(values);
    fn bend_map(
        x: Address,
        biases: Biases,
        drop: Address,
        y: Address,
        values: i64,
        channels: Channels,
        f: i32,
    ) in blocks(values);
    fn bend_wide_backward(
        x: Address,
        biases: Biases,
        drop: Address,
        dy: Address,
        dx: Address,
        values: i64,
        channels: Channels,
        f: i32,
        accumulate: i32,
    ) in blocks(values);
    fn bend_map_backward(
        x: Address,
        biases: Biases,
        drop: Address,
        dy: Address,
        dx: Address,
        values: i64,
        channels: Channels,
        f: i32,
        accumulate: i32,
    ) in blocks(values);
    fn gate(
        x: Address,
        c2: Address,
        more: Added,
        y: Address,
        values: i64,
        channels: i32,
        pixels_per_image: i32,
    ) in blocks(values);
    fn gate_backward(
        dy: Address,
        more: Added,
        c2: Address,
        values: i64,
        channels: i32,
        pixels_per_image: i32,
    ) in blocks(values);
    fn hw_backward(
        d_c2: Address,
        conditions: Address,
        d_hw: Address,
        rows: i32,
        channels: i32,
        images: i32,
        pixels_per_image: i64,
    ) in blocks(i64::from(rows) * i64::from(channels));
    fn shift(
        from: Address,
        to: Address,
        values: i64,
        h: i32,
        w: i32,
        channels: i32,
        down: i32,
        right: i32,
    ) in blocks(values);
    fn shift_backward(
        dy: Address,
        dx: Address,
        values: i64,
        h: i32,
        w: i32,
        channels: i32,
        down: i32,
        right: i32,
        accumulate: i32,
    ) in blocks(values);
    fn add_bias(bias: Address, to: Address, values: i64, channels: i32) in blocks(values);
    fn add(from: Address, to: Address, values: i64) in blocks(values);
    fn copy(from: Address, to: Address, values: i64) in blocks(values);
    fn concat(from: Address, to: Address, values: i64, channels: Channels) in blocks(values);
    fn concat_backward(
        dy: Address,
        dx: Address,
        values: i64,
        channels: Channels,
        accumulate: i32,
    ) in blocks(values);
    fn elu(x: Address, y: Address, values: i64) in blocks(values);
    fn elu_backward(x: Address, dy: Address, dx: Address, values: i64, accumulate: i32)
        in blocks(values);

    fn convolve_wide(
        fine: Address,
        weight: Address,
        coarse: Address,
        geometry: Geometry,
        accumulate: i32,
    ) in blocks(geometry.coarse_values());
    fn transposed_wide(
        coarse: Address,
        weight: Address,
        fine: Address,
        geometry: Geometry,
        accumulate: i32,
    ) in blocks(geometry.fine_values());
    fn by_weight_wide(fine: Address, coarse: Address, d_weight: Address, geometry: Geometry)
        in blocks(geometry.weights());
    fn sum_pixels_wide(d_to: Address, partial: Address, pixels: i64, channels: i32)
        in [columns(channels.into()), chunks(pixels), 1];
    fn convolve_map(
        fine: Address,
        weight: Address,
        coarse: Address,
        geometry: Geometry,
        accumulate: i32,
    ) in blocks(geometry.coarse_values());
    fn transposed_map(
        coarse: Address,
        weight: Address,
        fine: Address,
        geometry: Geometry,
        accumulate: i32,
    ) in blocks(geometry.fine_values());
    fn by_weight_map(fine: Address, coarse: Address, d_weight: Address, geometry: Geometry)
        in blocks(geometry.weights());
    fn sum_pixels_map(d_to: Address, partial: Address, pixels: i64, channels: i32)
        in [columns(channels.into()), chunks(pixels), 1];

    fn sum_chunks(partial: Address, d_bias: Address, chunks: i32, channels: i32)
        in blocks(channels.into());

    fn likelihood(
        levels: Address,
        logits: Address,
        nats: Address,
        gradient: Address,
        pixels: i64,
        channels: i32,
        components: i32,
    ) in blocks(pixels);
    fn likelihood_of_codes(
        images: Address,
        logits: Address,
        nats: Address,
        gradient: Address,
        pixels: i64,
        bytes: i32,
        codes: i32,
    ) in blocks(pixels);
    fn sum_images(nats: Address, sums: Address, pixels_per_image: i64, images: i32)
        in [images.unsigned_abs(), 1, 1];

    fn attend(queries: Address, keys_values: Address, seen: Address, heads: Heads)
        in blocks(heads.count);
    fn attend_backward_queries(
        queries: Address,
        keys_values: Address,
        d_seen: Address,
        d_queries: Address,
        totals: Address,
        heads: Heads,
        accumulate: i32,
    ) in blocks(heads.count);
    fn attend_backward_keys_values(
        queries: Address,
        keys_values: Address,
        d_seen: Address,
        totals: Address,
        d_keys_values: Address,
        heads: Heads,
        accumulate: i32,
    ) in blocks(heads.count);

    fn scales(parameters: Address, scales: Address, norms: Address, layers: u32, widest: i64)
        in [columns(widest), layers, 1];
    fn weights(
        parameters: Address,
        scales: Address,
        weights: Address,
        norms: Address,
        layers: u32,
        largest: i64,
    ) in [blocks(largest)[0].min(1024), layers, 1];
    fn scales_backward(
        parameters: Address,
        d_weights: Address,
        gradients: Address,
        by_weight: Address,
        by_v: Address,
        norms: Address,
        layers: u32,
        widest: i64,
    ) in [columns(widest), layers, 1];
    fn weights_backward(
        parameters: Address,
        d_weights: Address,
        by_weight: Address,
        by_v: Address,
        gradients: Address,
        norms: Address,
        layers: u32,
        largest: i64,
    ) in [blocks(largest)[0].min(1024), layers, 1];
    fn sum_taps(
        memory: Address,
        weights: Address,
        taps: Address,
        labels: Address,
        at: Address,
        sum: Sum,
        images: i32,
    ) in blocks(i64::from(sum.count) * i64::from(images) * i64::from(sum.channels));
    fn see(
        memory: Address,
        at: Address,
        start: i64,
        scale: i32,
        columns: i32,
        channels: i32,
        heads: i32,
        queries: Ring,
        keys_values: Ring,
        images: i32,
    ) in blocks(i64::from(images) * i64::from(heads));
    fn find_wrong(values: Address, count: i64, flag: Address) in blocks(count);
    fn adam(
        rates: Address,
        flag: Address,
        parameters: Address,
        gradients: Address,
        first: Address,
        second: Address,
        average: Address,
        spans: Address,
        number: u32,
        longest: i64,
    ) in [blocks(longest)[0].min(1 << 16), number, 1];
    fn muon_momentum(
        rates: Address,
        flag: Address,
        gradients: Address,
        first: Address,
        squares: Address,
        matrices: Address,
        number: u32,
    ) in [SUMMED as u32, number, 1];
    fn muon_scale(
        gradients: Address,
        squares: Address,
        y: Address,
        least_norm: f64,
        matrices: Address,
        number: u32,
        largest: i64,
    ) in [blocks(largest)[0].min(1024), number, 1];
    fn muon_gram(y: Address, gram: Address, matrices: Address, number: u32, shorter: i64)
        in [tiles(shorter), tiles(shorter), number];
    fn muon_product(
        x: Address,
        factor: Address,
        out: Address,
        scale: f32,
        by_product: f32,
        square: i32,
        matrices: Address,
        number: u32,
        rows: i64,
        shorter: i64,
    ) in [tiles(shorter), tiles(rows), number];
    fn muon(
        rates: Address,
        flag: Address,
        learning_rate: f32,
        y: Address,
        parameters: Address,
        average: Address,
        matrices: Address,
        number: u32,
        largest: i64,
    ) in [blocks(largest)[0].min(1024), number, 1];
}
