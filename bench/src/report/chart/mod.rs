//! Line charts with logarithmic axes, as SVG or PNG, or as text for a terminal.

mod raster;
mod svg;
mod text;

use raster::Raster;
use svg::Svg;
use text::Text;

/// A figure of one or more panels that share their axes and their legend.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chart {
    /// Above everything.
    pub title: String,
    /// Below every panel; values of it are byte counts.
    pub x_label: String,
    /// Above every vertical axis.
    pub y_label: String,
    /// Values of the vertical axis are percentages: it is linear and begins at 0.
    pub y_percent: bool,
    /// From left to right, two a row.
    pub panels: Vec<Panel>,
}

/// One pair of axes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Panel {
    /// Above the panel.
    pub title: String,
    /// Its lines.
    pub series: Vec<Series>,
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the legend; lines of one name have one colour.
    pub label: String,
    /// A bound rather than a figure: dashed, without dots.
    pub bound: bool,
    /// Positive coordinates, ascending by the first.
    pub points: Vec<(f64, f64)>,
}

/// Red, green, blue.
type Color = [u8; 3];
type Point = (f64, f64);

/// Colours that people with any colour vision tell apart (after Okabe and Ito).
const PALETTE: [Color; 8] = [
    [0x00, 0x72, 0xb2],
    [0xd5, 0x5e, 0x00],
    [0x00, 0x9e, 0x73],
    [0xcc, 0x79, 0xa7],
    [0x56, 0xb4, 0xe9],
    [0xe6, 0x9f, 0x00],
    [0x00, 0x00, 0x00],
    [0x8c, 0x56, 0x4b],
];
const INK: Color = [0x22, 0x22, 0x22];
const GRID: Color = [0xdd, 0xdd, 0xdd];

/// Pixels of a panel's axes and around them.
const PLOT: Point = (380.0, 260.0);
const MARGIN_LEFT: f64 = 64.0;
const MARGIN_TOP: f64 = 56.0;
const MARGIN_BOTTOM: f64 = 60.0;
const GAP: f64 = 24.0;
const TITLE_HEIGHT: f64 = 36.0;
const LEGEND_WIDTH: f64 = 190.0;
const LEGEND_LINE: f64 = 22.0;
const DASH: f64 = 7.0;

/// Where a text is relative to its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Anchor {
    Start,
    Middle,
    End,
}

/// What a chart is drawn on; pixels from the top left corner.
trait Canvas {
    fn line(&mut self, points: &[Point], color: Color, width: f64, dashed: bool);
    fn dot(&mut self, at: Point, radius: f64, color: Color);
    /// `at` is on the base line of the text.
    fn text(&mut self, at: Point, anchor: Anchor, text: &str);
}

/// Extent of the data.
#[derive(Clone, Copy, Debug)]
struct Range {
    low: f64,
    high: f64,
    linear: bool,
}

impl Chart {
    /// The chart as an SVG document.
    #[must_use]
    pub fn svg(&self) -> String {
        let mut canvas = Svg::new(self.size());
        self.draw(&mut canvas);
        canvas.finish()
    }

    /// The chart as a PNG file.
    ///
    /// # Errors
    /// When it is too large to be encoded.
    pub fn png(&self) -> anyhow::Result<Vec<u8>> {
        let mut canvas = Raster::new(self.size());
        self.draw(&mut canvas);
        canvas.finish()
    }

    /// The chart as lines of text. Lines are drawn with letters, one for each name.
    #[must_use]
    pub fn text(&self) -> String {
        let mut canvas = Text::new(self.size());
        self.draw(&mut canvas);
        canvas.finish()
    }

    fn columns(&self) -> usize {
        self.panels.len().clamp(1, 2)
    }

    fn size(&self) -> Point {
        let rows = self.panels.len().div_ceil(self.columns()).max(1);
        let (width, height) = cell();
        (
            width * count(self.columns()) + LEGEND_WIDTH,
            (TITLE_HEIGHT + height * count(rows))
                .max(TITLE_HEIGHT + MARGIN_TOP + LEGEND_LINE * (count(self.labels().len()) + 3.0)),
        )
    }

    /// Names of all lines, each once.
    fn labels(&self) -> Vec<&str> {
        let mut labels: Vec<&str> = Vec::new();
        for series in self.panels.iter().flat_map(|panel| &panel.series) {
            if !labels.contains(&series.label.as_str()) {
                labels.push(&series.label);
            }
        }
        labels
    }

    fn draw(&self, canvas: &mut dyn Canvas) {
        let points = || {
            let series = self.panels.iter().flat_map(|panel| &panel.series);
            series.flat_map(|series| &series.points)
        };
        let x = Range::of(points().map(|&(x, _)| x), 2.0);
        let y = if self.y_percent {
            Range::percent(points().map(|&(_, y)| y))
        } else {
            Range::of(points().map(|&(_, y)| y), 10.0)
        };
        canvas.text((16.0, 24.0), Anchor::Start, &self.title);
        let labels = self.labels();
        let (width, height) = cell();
        for (i, panel) in self.panels.iter().enumerate() {
            let corner = (
                width * count(i % self.columns()) + MARGIN_LEFT,
                TITLE_HEIGHT + height * count(i / self.columns()) + MARGIN_TOP,
            );
            self.axes(canvas, corner, panel, x, y);
            for series in &panel.series {
                let color = color_of(&labels, &series.label);
                let place = |&(a, b): &Point| {
                    (
                        corner.0 + x.part(a) * PLOT.0,
                        corner.1 + (1.0 - y.part(b)) * PLOT.1,
                    )
                };
                let places: Vec<Point> = series.points.iter().map(place).collect();
                let width = if series.bound { 1.3 } else { 2.0 };
                canvas.line(&places, color, width, series.bound);
                if !series.bound {
                    for at in places {
                        canvas.dot(at, 3.2, color);
                    }
                }
            }
        }
        let left = width * count(self.columns()) + 8.0;
        let mut top = TITLE_HEIGHT + MARGIN_TOP;
        for &label in &labels {
            let color = color_of(&labels, label);
            let y = top - 5.0;
            canvas.line(&[(left, y), (left + 28.0, y)], color, 2.0, false);
            canvas.dot((left + 14.0, y), 3.2, color);
            canvas.text((left + 36.0, top), Anchor::Start, label);
            top += LEGEND_LINE;
        }
        let bounds = self.panels.iter().flat_map(|panel| &panel.series);
        if bounds.into_iter().any(|series| series.bound) {
            let y = top - 5.0;
            canvas.line(&[(left, y), (left + 28.0, y)], INK, 1.3, true);
            canvas.text((left + 36.0, top), Anchor::Start, "limit, same run");
        }
    }

    fn axes(&self, canvas: &mut dyn Canvas, corner: Point, panel: &Panel, x: Range, y: Range) {
        let (left, top) = corner;
        let (right, bottom) = (left + PLOT.0, top + PLOT.1);
        for tick in x.ticks(2.0) {
            let at = left + x.part(tick) * PLOT.0;
            canvas.line(&[(at, top), (at, bottom)], GRID, 1.0, false);
            canvas.text((at, bottom + 18.0), Anchor::Middle, &bytes_label(tick));
        }
        let labelled = y.ticks(10.0);
        let between = labelled.iter().filter(|_| !y.linear);
        let between = between.flat_map(|&tick| [tick * 2.0, tick * 5.0]);
        for tick in between.filter(|&tick| tick < y.high) {
            let at = bottom - y.part(tick) * PLOT.1;
            canvas.line(&[(left, at), (right, at)], GRID, 0.6, false);
        }
        for tick in labelled {
            let at = bottom - y.part(tick) * PLOT.1;
            canvas.line(&[(left, at), (right, at)], GRID, 1.0, false);
            canvas.text((left - 6.0, at + 5.0), Anchor::End, &tick.to_string());
        }
        let frame = [
            (left, top),
            (right, top),
            (right, bottom),
            (left, bottom),
            (left, top),
        ];
        canvas.line(&frame, INK, 1.0, false);
        let middle = left + PLOT.0 / 2.0;
        canvas.text((middle, top - 12.0), Anchor::Middle, &panel.title);
        canvas.text((left, top - 12.0), Anchor::End, &self.y_label);
        canvas.text((middle, bottom + 40.0), Anchor::Middle, &self.x_label);
    }
}

impl Range {
    /// Whole powers of `base` around the values.
    fn of(values: impl Iterator<Item = f64>, base: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for value in values.filter(|value| value.is_finite() && *value > 0.0) {
            low = low.min(value);
            high = high.max(value);
        }
        if low > high {
            (low, high) = (1.0, base);
        }
        let exponent = |value: f64| value.ln() / base.ln();
        let low = base.powf((exponent(low) + 1e-9).floor());
        let high = base.powf((exponent(high) - 1e-9).ceil());
        Self {
            low,
            high: high.max(low * base),
            linear: false,
        }
    }

    /// From 0 to a multiple of ten.
    fn percent(values: impl Iterator<Item = f64>) -> Self {
        let high = values.filter(|value| value.is_finite()).fold(0.0, f64::max);
        Self {
            low: 0.0,
            high: ((high / 10.0).ceil() * 10.0).max(10.0),
            linear: true,
        }
    }

    /// Where a value lies between the ends, 0 to 1.
    fn part(self, value: f64) -> f64 {
        let part = if self.linear {
            (value - self.low) / (self.high - self.low)
        } else {
            (value / self.low).ln() / (self.high / self.low).ln()
        };
        part.clamp(0.0, 1.0)
    }

    /// Powers of `base`, or steps of ten where the range is linear, from end to end; thinned out
    /// where there are more than twelve.
    fn ticks(self, base: f64) -> Vec<f64> {
        let next = |at: &f64| Some(if self.linear { at + 10.0 } else { at * base });
        let all: Vec<f64> = std::iter::successors(Some(self.low), next)
            .take_while(|at| *at <= self.high * 1.000_001)
            .collect();
        let step = all.len().div_ceil(12).max(1);
        all.into_iter().step_by(step).collect()
    }
}

fn color_of(labels: &[&str], label: &str) -> Color {
    let place = labels.iter().position(|&other| other == label).unwrap_or(0);
    PALETTE[place % PALETTE.len()]
}

/// Size of a panel with its margins.
fn cell() -> Point {
    (
        MARGIN_LEFT + PLOT.0 + GAP,
        MARGIN_TOP + PLOT.1 + MARGIN_BOTTOM,
    )
}

#[expect(clippy::cast_precision_loss, reason = "a few panels or lines")]
const fn count(number: usize) -> f64 {
    number as f64
}

/// `4K`, `1M`: ticks are powers of two.
fn bytes_label(bytes: f64) -> String {
    for (unit, size) in [
        ("T", 1_099_511_627_776.0),
        ("G", 1_073_741_824.0),
        ("M", 1_048_576.0),
        ("K", 1024.0),
    ] {
        if bytes >= size {
            return format!("{}{unit}", bytes / size);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart {
        let series = |label: &str, bound, points: &[Point]| Series {
            label: label.to_owned(),
            bound,
            points: points.to_vec(),
        };
        Chart {
            title: "a & b".to_owned(),
            x_label: "block size".to_owned(),
            y_label: "GB/s".to_owned(),
            y_percent: false,
            panels: vec![Panel {
                title: "write".to_owned(),
                series: vec![
                    series("shm x1", false, &[(4096.0, 5.0), (65536.0, 20.0)]),
                    series("shm x1", true, &[(4096.0, 30.0), (65536.0, 31.0)]),
                ],
            }],
        }
    }

    #[test]
    fn axes_end_at_whole_powers() {
        let range = Range::of([4096.0, 65536.0].into_iter(), 2.0);
        assert_eq!(
            range.ticks(2.0),
            [4096.0, 8192.0, 16384.0, 32768.0, 65536.0]
        );
        assert!((range.part(16384.0) - 0.5).abs() < 1e-9);
        let range = Range::of([0.3, 42.0].into_iter(), 10.0);
        assert_eq!(range.ticks(10.0).len(), 4);
        // One point, or none, is no reason to fail.
        assert_eq!(Range::of([8.0].into_iter(), 2.0).ticks(2.0), [8.0, 16.0]);
        assert!(Range::of([].into_iter(), 10.0).part(3.0).is_finite());
    }

    #[test]
    fn the_svg_is_one_document_with_its_texts_escaped() {
        let svg = chart().svg();
        assert!(
            svg.starts_with("<svg ") && svg.ends_with("</svg>\n"),
            "{svg}"
        );
        assert!(svg.contains("a &amp; b") && !svg.contains("a & b"), "{svg}");
        for text in [
            "4K",
            "64K",
            "GB/s",
            "block size",
            "shm x1",
            "limit, same run",
        ] {
            assert!(svg.contains(&format!(">{text}</text>")), "{text} in {svg}");
        }
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        // The bound and its place in the legend.
        assert_eq!(svg.matches("stroke-dasharray").count(), 2);
    }

    #[test]
    fn percentages_begin_at_0() {
        let range = Range::percent([3.0, 31.0].into_iter());
        assert_eq!(range.ticks(10.0), [0.0, 10.0, 20.0, 30.0, 40.0]);
        assert!((range.part(10.0) - 0.25).abs() < 1e-9);
    }

    #[test]
    fn the_text_has_the_lines_and_their_names() {
        let text = Chart {
            y_percent: true,
            ..chart()
        }
        .text();
        for part in ["a & b", "64K", "GB/s", "block size", "* shm x1", "40"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(text.matches('*').count() > 20, "{text}");
        assert!(
            text.lines().all(|line| line.chars().count() <= 100),
            "{text}"
        );
    }

    #[test]
    fn the_png_can_be_decoded_and_shows_something() {
        let bytes = chart().png().unwrap();
        let decoder = png::Decoder::new(std::io::Cursor::new(&bytes));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        let (width, height) = chart().size();
        assert_eq!(f64::from(info.width), width);
        assert_eq!(f64::from(info.height), height);
        let blue = pixels.chunks(3).filter(|pixel| *pixel == PALETTE[0]);
        assert!(blue.count() > 100, "the line is drawn");
        assert!(pixels.iter().filter(|&&value| value == 255).count() > pixels.len() / 2);
    }
}
