//! Causal self-attention (PixelSNAIL; Chen et al., 2018), forward and backward: every pixel sees those up
//! to it in raster order, in shares that are the softmax of the products of its query with their keys.
//! The shares are not kept: the backward pass computes them again.

use rayon::prelude::*;

use super::gated_resnet::MapGradient;
use super::math::exp;

/// Attention over maps of `pixels` each. Queries, and what is seen, are \[n, pixels, channels\]; keys
/// and values \[n, pixels, 2 * channels\], the keys' channels first. The functions panic where a slice
/// has not the length that its shape says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Among which the channels are shared out, evenly.
    pub heads: usize,
    /// Of queries, keys and values each.
    pub channels: usize,
    /// Of a map.
    pub pixels: usize,
}

/// A head of one image: arrays \[width, pixels\].
struct Head {
    width: usize,
    pixels: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Attention {
    /// Channels of a head.
    fn width(&self) -> usize {
        self.channels / self.heads
    }

    /// Writes what is seen.
    pub fn forward(&self, queries: &[f32], keys_values: &[f32], seen: &mut [f32]) {
        self.expect(queries.len(), keys_values.len(), seen.len());
        let size = self.pixels * self.channels;
        let images = queries
            .par_chunks_exact(size)
            .zip(keys_values.par_chunks_exact(2 * size))
            .zip(seen.par_chunks_exact_mut(size));
        images.for_each(|((queries, keys_values), seen)| {
            let mut shares = vec![0.0; self.pixels];
            for number in 0..self.heads {
                let head = self.head(number, keys_values);
                let own = number * self.width()..(number + 1) * self.width();
                let pixels = queries.chunks_exact(self.channels);
                let seen = seen.chunks_exact_mut(self.channels);
                for (i, (query, seen)) in pixels.zip(seen).enumerate() {
                    forward_pixel(
                        &query[own.clone()],
                        [&head.keys, &head.values],
                        self.pixels,
                        &mut shares[..=i],
                        &mut seen[own.clone()],
                    );
                }
            }
        });
    }

    /// Writes, or adds, the gradients by queries and by keys and values, given `d_seen`, that by what is
    /// seen.
    pub fn backward(
        &self,
        queries: &[f32],
        keys_values: &[f32],
        d_seen: &[f32],
        [d_queries, d_keys_values]: [MapGradient; 2],
    ) {
        self.expect(queries.len(), keys_values.len(), d_seen.len());
        self.expect(
            d_queries.values.len(),
            d_keys_values.values.len(),
            d_seen.len(),
        );
        let size = self.pixels * self.channels;
        let (adds_queries, adds_keys_values) = (d_queries.accumulate, d_keys_values.accumulate);
        let images = queries
            .par_chunks_exact(size)
            .zip(keys_values.par_chunks_exact(2 * size))
            .zip(d_seen.par_chunks_exact(size))
            .zip(d_queries.values.par_chunks_exact_mut(size))
            .zip(d_keys_values.values.par_chunks_exact_mut(2 * size));
        images.for_each(
            |((((queries, keys_values), d_seen), d_queries), d_keys_values)| {
                let (width, pixels) = (self.width(), self.pixels);
                let [mut shares, mut d_products] = [vec![0.0; pixels], vec![0.0; pixels]];
                if !adds_queries {
                    d_queries.fill(0.0);
                }
                if !adds_keys_values {
                    d_keys_values.fill(0.0);
                }
                for number in 0..self.heads {
                    let head = self.head(number, keys_values);
                    let mut gradient = Head {
                        keys: vec![0.0; width * pixels],
                        values: vec![0.0; width * pixels],
                        ..head
                    };
                    let own = number * width..(number + 1) * width;
                    for i in 0..pixels {
                        let here = i * self.channels + own.start..i * self.channels + own.end;
                        backward_pixel(
                            &queries[here.clone()],
                            &d_seen[here.clone()],
                            [&head.keys, &head.values],
                            pixels,
                            [&mut shares[..=i], &mut d_products[..=i]],
                            &mut d_queries[here],
                            [&mut gradient.keys, &mut gradient.values],
                        );
                    }
                    gradient.add_to(self.channels, own.start, d_keys_values);
                }
            },
        );
    }

    fn expect(&self, queries: usize, keys_values: usize, seen: usize) {
        let size = self.pixels.checked_mul(self.channels);
        let size = size.expect("maps that fit into memory");
        assert!(
            self.heads > 0 && self.channels.is_multiple_of(self.heads),
            "channels shared out evenly"
        );
        assert!(queries.is_multiple_of(size), "whole maps");
        assert_eq!(keys_values, 2 * queries, "as many keys and values");
        assert_eq!(seen, queries, "as much seen");
    }

    /// The keys and values of a head.
    fn head(&self, number: usize, keys_values: &[f32]) -> Head {
        let (width, pixels) = (self.width(), self.pixels);
        let [keys, values] = [0, 1].map(|part| {
            let mut turned = vec![0.0; width * pixels];
            let first = part * self.channels + number * width;
            for (pixel, from) in keys_values.chunks_exact(2 * self.channels).enumerate() {
                for (channel, &value) in from[first..first + width].iter().enumerate() {
                    turned[channel * pixels + pixel] = value;
                }
            }
            turned
        });
        Head {
            width,
            pixels,
            keys,
            values,
        }
    }
}

impl Head {
    /// Adds it to keys and values of `channels` each, from their channel `first` on.
    fn add_to(&self, channels: usize, first: usize, keys_values: &mut [f32]) {
        for (part, turned) in [&self.keys, &self.values].into_iter().enumerate() {
            let first = part * channels + first;
            for (pixel, to) in keys_values.chunks_exact_mut(2 * channels).enumerate() {
                for (channel, to) in to[first..first + self.width].iter_mut().enumerate() {
                    *to += turned[channel * self.pixels + pixel];
                }
            }
        }
    }
}

/// Sums that are taken side by side: so they are the same with vectors of any width.
const LANES: usize = 16;

#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a, b) = (a.chunks(LANES), b.chunks(LANES));
    for (a, b) in a.zip(b) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

/// `sum += factor * values`.
#[inline(always)]
pub(crate) fn add_scaled(sum: &mut [f32], factor: f32, values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += factor * value;
    }
}

/// The softmax of some values, in place.
#[inline(always)]
pub(crate) fn softmax(values: &mut [f32]) {
    let mut most = [f32::MIN; LANES];
    for values in values.chunks(LANES) {
        for (most, &value) in most.iter_mut().zip(values) {
            *most = if value > *most { value } else { *most };
        }
    }
    let most = most.into_iter().fold(f32::MIN, f32::max);
    let mut total = [0.0; LANES];
    for values in values.chunks_mut(LANES) {
        for (total, value) in total.iter_mut().zip(values) {
            *value = exp(*value - most);
            *total += *value;
        }
    }
    let scale = 1.0 / total.iter().sum::<f32>();
    for value in values {
        *value *= scale;
    }
}

/// What the products of queries with keys are multiplied by.
#[inline(always)]
pub(crate) fn scale(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

/// The shares of the first pixels, as many as there are shares, for a query.
#[inline(always)]
fn shares_of(query: &[f32], keys: &[f32], pixels: usize, shares: &mut [f32]) {
    shares.fill(0.0);
    let scale = scale(query.len());
    for (query, keys) in query.iter().zip(keys.chunks_exact(pixels)) {
        add_scaled(shares, query * scale, keys);
    }
    softmax(shares);
}

vectorized! {
    /// What a pixel sees of those up to it, as many as there are shares to be written.
    fn forward_pixel(
        query: &[f32],
        keys_values: [&[f32]; 2],
        pixels: usize,
        shares: &mut [f32],
        seen: &mut [f32],
    ) {
        let [keys, values] = keys_values;
        shares_of(query, keys, pixels, shares);
        for (seen, values) in seen.iter_mut().zip(values.chunks_exact(pixels)) {
            *seen = dot(shares, values);
        }
    }
}

vectorized! {
    /// A pixel's part of the backward pass: all gradients are added to.
    fn backward_pixel(
        query: &[f32],
        d_seen: &[f32],
        keys_values: [&[f32]; 2],
        pixels: usize,
        scratch: [&mut [f32]; 2],
        d_query: &mut [f32],
        d_keys_values: [&mut [f32]; 2],
    ) {
        let ([keys, values], [d_keys, d_values]) = (keys_values, d_keys_values);
        let [shares, d_products] = scratch;
        shares_of(query, keys, pixels, shares);
        d_products.fill(0.0);
        for (d_seen, values) in d_seen.iter().zip(values.chunks_exact(pixels)) {
            add_scaled(d_products, *d_seen, values);
        }
        let mean = dot(shares, d_products);
        let scale = scale(query.len());
        for (d_product, share) in d_products.iter_mut().zip(&*shares) {
            *d_product = share * (*d_product - mean) * scale;
        }
        let keys = keys.chunks_exact(pixels);
        for (d_query, keys) in d_query.iter_mut().zip(keys) {
            *d_query += dot(d_products, keys);
        }
        for (query, d_keys) in query.iter().zip(d_keys.chunks_exact_mut(pixels)) {
            add_scaled(&mut d_keys[..d_products.len()], *query, d_products);
        }
        for (d_seen, d_values) in d_seen.iter().zip(d_values.chunks_exact_mut(pixels)) {
            add_scaled(&mut d_values[..shares.len()], *d_seen, shares);
        }
    }
}
