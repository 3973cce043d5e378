// The network pixel by pixel: pixelcnn-core's incremental/program.rs says what a sum, a tap and a ring are.
// Memory is that of each image times the number of images, pixels innermost but for images and channels. Where
// the pixel is, all kernels read from `due`: so the same ones, in the same order, serve many pixels.

// Rings are [RING] numbers: where they start, how often they are halved, their channels, rows and columns.
const RING = 5u;
// Taps are [TAP]: their ring, rows down, columns to the right, the channels that they read.
const TAP = 4u;
const PANEL = 16u;

fn scale_of(ring: u32) -> u32 { return rings[ring * RING + 1u]; }
fn channels_of(ring: u32) -> u32 { return rings[ring * RING + 2u]; }

// Where a pixel of an image begins.
fn place(ring: u32, y: i32, x: i32, image: u32) -> u32 {
    let first = ring * RING;
    let channels = rings[first + 2u];
    let rows = i32(rings[first + 3u]);
    let columns = rings[first + 4u] + 2u;
    let row = u32((y + rows) % rows);
    return (rings[first] + (row * columns + u32(x + 1)) * channels) * arg.images + image * channels;
}
