//! Drawing as an SVG document.

use std::fmt::Write;

use super::{Anchor, Canvas, Color, DASH, Point};

/// A document that grows.
pub(super) struct Svg(String);

impl Svg {
    pub(super) fn new((width, height): Point) -> Self {
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"14\" \
             fill=\"none\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        ))
    }

    pub(super) fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing into a string does not fail.
        let _ = self.0.write_fmt(element);
        self.0.push('\n');
    }
}

impl Canvas for Svg {
    fn line(&mut self, points: &[Point], color: Color, width: f64, dashed: bool) {
        let places: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let dash = if dashed {
            format!(" stroke-dasharray=\"{DASH} {DASH}\"")
        } else {
            String::new()
        };
        self.push(format_args!(
            "<polyline points=\"{}\" stroke=\"{}\" stroke-width=\"{width}\"{dash}/>",
            places.join(" "),
            hex(color)
        ));
    }

    fn dot(&mut self, (x, y): Point, radius: f64, color: Color) {
        self.push(format_args!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{}\"/>",
            hex(color)
        ));
    }

    fn text(&mut self, (x, y): Point, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        self.push(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{}\">{}</text>",
            hex(super::INK),
            escaped(text)
        ));
    }
}

fn hex([red, green, blue]: Color) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
