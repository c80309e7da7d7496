//! Drawing pixel by pixel, with soft edges, as a PNG file.

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

use super::{Anchor, Canvas, Color, DASH, INK, Point};

const WEIGHT: FontWeight = FontWeight::Regular;
const HEIGHT: RasterHeight = RasterHeight::Size16;
/// Rows of a glyph above its base line.
const ASCENT: f64 = 12.0;

/// White paper.
pub(super) struct Raster {
    width: u32,
    height: u32,
    pixels: Vec<Color>,
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, and what lies outside of the paper is not drawn"
)]
const fn whole(value: f64) -> u32 {
    value as u32
}

impl Raster {
    pub(super) fn new((width, height): Point) -> Self {
        let (width, height) = (whole(width), whole(height));
        Self {
            width,
            height,
            pixels: vec![[255; 3]; width as usize * height as usize],
        }
    }

    pub(super) fn finish(self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(self.pixels.as_flattened())?;
        writer.finish()?;
        Ok(bytes)
    }

    /// Puts `part` (0 to 1) of a colour onto a pixel.
    fn blend(&mut self, x: u32, y: u32, color: Color, part: f64) {
        if x >= self.width || y >= self.height {
            return;
        }
        let pixel = &mut self.pixels[y as usize * self.width as usize + x as usize];
        for (old, new) in pixel.iter_mut().zip(color) {
            let mixed = f64::from(*old) + (f64::from(new) - f64::from(*old)) * part;
            *old = u8::try_from(whole(mixed.round())).unwrap_or(u8::MAX);
        }
    }

    /// Covers all pixels for which `cover` is above 0, in a box around some points.
    fn cover(&mut self, points: &[Point], margin: f64, color: Color, cover: impl Fn(Point) -> f64) {
        let low = |of: fn(&Point) -> f64| {
            whole((points.iter().map(of).fold(f64::INFINITY, f64::min) - margin).floor())
        };
        let high = |of: fn(&Point) -> f64| {
            whole((points.iter().map(of).fold(0.0, f64::max) + margin).ceil())
        };
        let rows = low(|at| at.1)..=high(|at| at.1).min(self.height);
        let columns = low(|at| at.0)..=high(|at| at.0).min(self.width);
        for row in rows {
            for column in columns.clone() {
                let part = cover((f64::from(column) + 0.5, f64::from(row) + 0.5));
                if part > 0.0 {
                    self.blend(column, row, color, part.min(1.0));
                }
            }
        }
    }
}

impl Canvas for Raster {
    fn line(&mut self, points: &[Point], color: Color, width: f64, dashed: bool) {
        let mut walked = 0.0;
        for pair in points.windows(2) {
            let [a, b] = [pair[0], pair[1]];
            let (dx, dy) = (b.0 - a.0, b.1 - a.1);
            let length = dx.hypot(dy);
            if length < 1e-9 {
                continue;
            }
            self.cover(&[a, b], width, color, |(x, y)| {
                let along = ((x - a.0) * dx + (y - a.1) * dy) / length;
                if dashed && (walked + along).rem_euclid(2.0 * DASH) > DASH {
                    return 0.0;
                }
                let along = along.clamp(0.0, length);
                let away = (x - a.0 - dx / length * along).hypot(y - a.1 - dy / length * along);
                width / 2.0 + 0.5 - away
            });
            walked += length;
        }
    }

    fn dot(&mut self, at: Point, radius: f64, color: Color) {
        self.cover(&[at], radius + 1.0, color, |(x, y)| {
            radius + 0.5 - (x - at.0).hypot(y - at.1)
        });
    }

    fn text(&mut self, (x, y): Point, anchor: Anchor, text: &str) {
        let width = u32::try_from(get_raster_width(WEIGHT, HEIGHT)).unwrap_or(0);
        let whole_width = f64::from(width) * f64::from(u32::try_from(text.len()).unwrap_or(0));
        let left = match anchor {
            Anchor::Start => x,
            Anchor::Middle => x - whole_width / 2.0,
            Anchor::End => x - whole_width,
        };
        let (mut left, top) = (whole(left.round()), whole((y - ASCENT).round()));
        for character in text.chars() {
            // The font has the printable characters of ASCII; others show as a question mark.
            let glyph =
                get_raster(character, WEIGHT, HEIGHT).or_else(|| get_raster('?', WEIGHT, HEIGHT));
            let rows = glyph.iter().flat_map(|glyph| glyph.rows());
            for (row, line) in (0u32..).zip(rows) {
                for (column, &ink) in (0u32..).zip(line.iter()) {
                    let part = f64::from(ink) / 255.0;
                    self.blend(left + column, top + row, INK, part);
                }
            }
            left += width;
        }
    }
}
