//! Grids of images as PNG files.
