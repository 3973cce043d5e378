//! Small charts as PNG files: lines and histograms with axes, a legend and a title.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use pixelcnn::picture::{grid, write_png};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::terminal::Result;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 600;

/// Carried along, so that text looks the same everywhere and needs no installed fonts.
const FONT: &[u8] = include_bytes!("../fonts/DejaVuSans.ttf");

/// Colours that the colour-blind tell apart (Okabe and Ito, 2008); more series begin again.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];

/// Up to so many points of a line get a mark each.
const MARKED: usize = 40;

/// A chart with its texts.
#[derive(Debug, Clone)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Below the horizontal axis: the quantity and its unit.
    pub x_label: String,
    /// Beside the vertical axis.
    pub y_label: String,
    /// What is drawn, the first one undermost; each has a colour and a line in the legend.
    pub series: Vec<Series>,
}

/// Numbers with a name.
#[derive(Debug, Clone)]
pub struct Series {
    /// Its name in the legend.
    pub label: String,
    /// The numbers.
    pub shape: Shape,
}

/// How numbers are drawn. Places that are not finite are left out.
#[derive(Debug, Clone)]
pub enum Shape {
    /// Points (x, y) joined by a line.
    Line(Vec<(f64, f64)>),
    /// Bars that stand on 0, side by side: bar i reaches from edge i to edge i + 1.
    Bars {
        /// One more than there are bars, ascending.
        edges: Vec<f64>,
        /// Heights of the bars.
        heights: Vec<f64>,
    },
}

impl Series {
    /// The corners of what is drawn.
    fn corners(&self) -> Vec<(f64, f64)> {
        let corners = match &self.shape {
            Shape::Line(points) => points.clone(),
            Shape::Bars { edges, heights } => {
                // Up, along and down: the outline of neighbouring bars.
                let pairs = edges.windows(2).zip(heights);
                let tops = pairs
                    .flat_map(|(edges, &height)| edges.iter().map(move |&edge| (edge, height)));
                let [first, last] =
                    [edges.first(), edges.last()].map(|edge| (*edge.unwrap_or(&0.0), 0.0));
                [first].into_iter().chain(tops).chain([last]).collect()
            }
        };
        let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
        corners.into_iter().filter(finite).collect()
    }
}

impl Chart {
    /// Writes the chart to a PNG file.
    pub fn write(&self, path: &Path) -> Result {
        let pixels = self
            .pixels()
            .map_err(|error| format!("cannot draw `{}`: {error}", path.display()))?;
        let shape = [1, HEIGHT as usize, WIDTH as usize, 3];
        Ok(write_png(path, &grid(&pixels, shape, 1, 0, 1)?)?)
    }

    /// RGB \[HEIGHT, WIDTH, 3\].
    fn pixels(&self) -> std::result::Result<Vec<u8>, Box<dyn Error>> {
        carry_font()?;
        let mut pixels = vec![255; (WIDTH * HEIGHT * 3) as usize];
        let area = BitMapBackend::with_buffer(&mut pixels, (WIDTH, HEIGHT)).into_drawing_area();
        let corners: Vec<Vec<(f64, f64)>> = self.series.iter().map(Series::corners).collect();
        let all = || corners.iter().flatten();
        let x_range = range(all().map(|(x, _)| *x), 0.0);
        let bars = |series: &Series| matches!(series.shape, Shape::Bars { .. });
        let mut y_range = range(all().map(|(_, y)| *y), 0.05);
        if self.series.iter().any(bars) {
            // The legend lies above the bars, which may stand anywhere.
            y_range.end *= 1.05 + 0.06 * self.series.len() as f64;
        }
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 28))
            .margin(16)
            .margin_right(32)
            .x_label_area_size(60)
            .y_label_area_size(88)
            .build_cartesian_2d(x_range, y_range)?;
        chart
            .configure_mesh()
            .x_desc(&self.x_label)
            .y_desc(&self.y_label)
            .axis_desc_style(("sans-serif", 22))
            .label_style(("sans-serif", 20))
            .x_label_formatter(&|x| number(*x))
            .y_label_formatter(&|y| number(*y))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        for (i, (series, corners)) in self.series.iter().zip(&corners).enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            if bars(series) {
                let fill = Polygon::new(corners.clone(), colour.mix(0.35));
                chart.draw_series([fill])?;
            } else if corners.len() <= MARKED {
                let mark = |&point| Circle::new(point, 4, colour.filled());
                chart.draw_series(corners.iter().map(mark))?;
            }
            let line = LineSeries::new(corners.iter().copied(), colour.stroke_width(2));
            chart
                .draw_series(line)?
                .label(&series.label)
                .legend(move |(x, y)| {
                    Rectangle::new([(x, y - 7), (x + 24, y + 7)], colour.filled())
                });
        }
        if !self.series.is_empty() {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .legend_area_size(36)
                .margin(12)
                .label_font(("sans-serif", 20))
                .background_style(WHITE.mix(0.85))
                .border_style(BLACK.mix(0.3))
                .draw()?;
        }
        area.present()?;
        drop(chart);
        drop(area);
        Ok(pixels)
    }
}

/// Makes `sans-serif` the font that is carried along.
pub fn carry_font() -> Result {
    let carried = register_font("sans-serif", FontStyle::Normal, FONT);
    Ok(carried.map_err(|_| "the font is damaged")?)
}

/// From the least to the greatest value, wider by a share of that on either side, but not across
/// 0; never empty.
fn range(values: impl Iterator<Item = f64>, margin: f64) -> Range<f64> {
    let (least, greatest) = values.fold(
        (f64::INFINITY, f64::NEG_INFINITY),
        |(least, greatest), value| (least.min(value), greatest.max(value)),
    );
    if least > greatest {
        return 0.0..1.0;
    }
    let wider = match greatest - least {
        0.0 => least.abs().max(1.0) / 10.0,
        span => span * margin,
    };
    let start = if least >= 0.0 {
        (least - wider).max(0.0)
    } else {
        least - wider
    };
    start..greatest + wider
}

/// A tick's number without the digits that rounding leaves behind.
fn number(value: f64) -> String {
    let places = match value.abs() {
        0.0 => return "0".into(),
        size if !(1e-3..1e7).contains(&size) => return format!("{value:.1e}"),
        size => (4.0 - size.log10().floor()).clamp(0.0, 7.0) as usize,
    };
    let text = format!("{value:.places$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').into(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(series: Vec<Shape>) -> Chart {
        let named = |(i, shape)| Series {
            label: format!("series {i}"),
            shape,
        };
        Chart {
            title: "A title".into(),
            x_label: "bits/dim".into(),
            y_label: "images".into(),
            series: series.into_iter().enumerate().map(named).collect(),
        }
    }

    fn count(pixels: &[u8], colour: RGBColor) -> usize {
        let colour = [colour.0, colour.1, colour.2];
        pixels
            .chunks_exact(3)
            .filter(|pixel| **pixel == colour)
            .count()
    }

    #[test]
    fn bars_and_lines_are_where_the_numbers_say() {
        let bars = |heights: [f64; 2]| Shape::Bars {
            edges: vec![2.0, 3.0, 4.0],
            heights: heights.into(),
        };
        // The same height everywhere fills more than a half of it.
        let area = |heights| {
            let pixels = chart(vec![bars(heights)]).pixels().unwrap();
            let filled = |pixel: &&[u8]| pixel[2] > pixel[0] && pixel[2] < 255;
            pixels.chunks_exact(3).filter(filled).count() as f64
        };
        let ratio = area([10.0, 10.0]) / area([10.0, 5.0]);
        assert!((1.25..1.4).contains(&ratio), "{ratio}");

        let line = Shape::Line(vec![(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 4.0)]);
        let pixels = chart(vec![line, bars([1.0, 2.0])]).pixels().unwrap();
        assert!(count(&pixels, COLOURS[0]) > 700);
        assert!(count(&pixels, COLOURS[1]) > 700);
    }

    #[test]
    fn texts_are_drawn() {
        let mut chart = chart(vec![]);
        let with = count(&chart.pixels().unwrap(), BLACK);
        chart.title.clear();
        chart.x_label.clear();
        chart.y_label.clear();
        assert!(with > 300 + count(&chart.pixels().unwrap(), BLACK));
    }

    #[test]
    fn any_numbers_can_be_drawn() {
        for points in [
            vec![],
            vec![(0.0, 0.0)],
            vec![(5.0, -3.0), (5.0, -3.0)],
            vec![(1e12, 1e-12), (2e12, 1e300)],
            vec![(f64::NAN, 1.0), (1.0, f64::INFINITY)],
        ] {
            chart(vec![Shape::Line(points)]).pixels().unwrap();
        }
        chart(vec![Shape::Bars {
            edges: vec![],
            heights: vec![],
        }])
        .pixels()
        .unwrap();
    }

    #[test]
    fn ticks_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (3.4000000000000004, "3.4"),
            (-0.25, "-0.25"),
            (120.0, "120"),
            (10_000.0, "10000"),
            (0.00002, "2.0e-5"),
            (3e7, "3.0e7"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
