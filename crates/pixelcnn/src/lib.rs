//! PixelCNN++.
