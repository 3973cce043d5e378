//! PixelCNN++.

mod atomic;
pub mod picture;
pub mod train;
