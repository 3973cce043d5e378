//! The discretized mixture of logistics.
