//! PixelCNN++.

pub mod data;
