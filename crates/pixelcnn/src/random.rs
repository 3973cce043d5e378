//! All random numbers of a run come from its seed: each purpose and index (a step, an epoch) has a
//! generator of its own, so that nothing depends on what was drawn before, and a resumed run draws
//! what an uninterrupted one would have.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// What numbers are drawn for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Initial parameters.
    Parameters,
    /// The batch for data-dependent initialisation.
    InitBatch,
    /// The order of the images in an epoch.
    Shuffle,
    /// Dropout in a step.
    Dropout,
    /// Uniforms of a sampled image.
    Sample,
    /// Uniforms of a completed image.
    Complete,
    /// Transformations of a step's images.
    Augmentation,
    /// Where the crops of an epoch lie.
    Crop,
}

/// The generator for a purpose at an index.
pub(crate) fn generator(seed: u64, purpose: Purpose, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(purpose as u64).to_le_bytes());
    key[16..24].copy_from_slice(&index.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}
