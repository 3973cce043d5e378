//! Pictures in strips: columns of a picture that are evaluated side by side, each some rows behind the one
//! to its left, of which it sees everything. So a picture is coded by many threads at a time, nothing is
//! computed twice, and what a strip does not see is only what lies above it to the right of its own edge.

use super::Group;
use super::program::{Program, Ring};
use super::weights::Line;

/// Rows that a strip is behind the one to its left: a row at the coarsest resolution.
pub const LAG: usize = 4;

/// A strip of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lane {
    /// The row, counted as the raster counts them, that is its first: a multiple of [`LAG`].
    pub start: usize,
    /// Its rows. Before them, and after, nothing is computed for it.
    pub rows: usize,
    /// The lane of the strip to its left, which begins [`LAG`] rows before; none where it is the picture's
    /// first.
    pub left: Option<usize>,
    /// The picture's class; any value for an unconditional model.
    pub class: u32,
}

/// What strips see of those to their left.
pub(super) struct Strips {
    lanes: Vec<Lane>,
    /// Of each lane the last column of all rings in the latest [`LAG`] rows.
    columns: Vec<Vec<f32>>,
    /// Where those of each ring begin.
    starts: Vec<usize>,
}

/// Rows of a ring that are kept.
fn rows(ring: &Ring) -> usize {
    LAG >> ring.scale
}

/// The rings of maps whose row begins with a row of the raster, their number and which of theirs it is.
fn due(program: &Program, y: usize) -> impl Iterator<Item = (usize, &Ring, isize)> {
    let rings = program.rings.iter().enumerate();
    let due = rings.filter(move |(_, ring)| y.is_multiple_of(1 << ring.scale));
    due.map(move |(number, ring)| (number, ring, (y >> ring.scale) as isize))
}

impl Strips {
    pub fn new(lanes: &[Lane], program: &Program) -> Strips {
        let mut size = 0;
        let starts = program.rings.iter().map(|ring| {
            let start = size;
            size += rows(ring) * ring.channels;
            start
        });
        let starts = starts.collect();
        Strips {
            lanes: lanes.to_vec(),
            columns: vec![vec![0.0; size]; lanes.len()],
            starts,
        }
    }

    /// Where a row of a ring is among the columns.
    fn place(&self, number: usize, ring: &Ring, row: isize) -> usize {
        self.starts[number] + row as usize % rows(ring) * ring.channels
    }

    /// Finds the lanes that have a row here, clears what was before those that begin, and gives them the columns
    /// to their left.
    pub fn begin_row(&self, program: &Program, y: usize, groups: &mut [Group]) {
        for group in groups {
            group.active.clear();
            for image in group.images.clone() {
                let lane = self.lanes[image];
                if !(lane.start..lane.start + lane.rows).contains(&y) {
                    continue;
                }
                group.active.push(image - group.images.start);
                if lane.start == y && y > 0 {
                    clear(program, group, image);
                }
                let Some(left) = lane.left else {
                    continue;
                };
                for (number, ring, row) in due(program, y) {
                    let from = self.place(number, ring, row);
                    let column = &self.columns[left][from..][..ring.channels];
                    let place = group.place(ring, image, [row, -1]);
                    Line::floats_mut(&mut group.lines)[place].copy_from_slice(column);
                }
            }
        }
    }

    /// Keeps the last column of all lanes.
    pub fn end_row(&mut self, program: &Program, y: usize, groups: &[Group]) {
        for group in groups {
            for image in group.images.clone() {
                for (number, ring, row) in due(program, y) {
                    let to = self.place(number, ring, row);
                    let place = group.place(ring, image, [row, ring.width as isize - 1]);
                    let column = &Line::floats(&group.lines)[place];
                    self.columns[image][to..][..ring.channels].copy_from_slice(column);
                }
            }
        }
    }
}

/// Fills all that a group has of an image with zeros.
fn clear(program: &Program, group: &mut Group, image: usize) {
    for ring in &program.rings {
        for row in 0..ring.rows as isize {
            for column in -1..=ring.width as isize {
                let place = group.place(ring, image, [row, column]);
                Line::floats_mut(&mut group.lines)[place].fill(0.0);
            }
        }
    }
}
