//! Drawing with characters, for terminals: a cell is 8 by 16 pixels.

use super::{Anchor, Canvas, Color, GRID, INK, PALETTE, Point};

const CELL: Point = (8.0, 16.0);
/// What stands for each colour of the palette.
const MARKS: [char; PALETTE.len()] = ['*', 'o', '+', 'x', '#', '@', '%', '&'];

/// A page of characters.
pub(super) struct Text {
    cells: Vec<Vec<char>>,
}

impl Text {
    pub(super) fn new((width, height): Point) -> Self {
        let row = vec![' '; index(width, CELL.0) + 1];
        Self {
            cells: vec![row; index(height, CELL.1) + 1],
        }
    }

    pub(super) fn finish(self) -> String {
        let lines = self.cells.iter().map(|row| {
            let line: String = row.iter().collect();
            line.trim_end().to_owned() + "\n"
        });
        lines.collect::<String>().trim_end().to_owned() + "\n"
    }

    fn put(&mut self, (x, y): Point, mark: char) {
        let cell = self
            .cells
            .get_mut(index(y, CELL.1))
            .and_then(|row| row.get_mut(index(x, CELL.0)));
        if let Some(cell) = cell
            // The first line that came here stays; frames and grids give way.
            && (MARKS.contains(&mark) || *cell == ' ')
            && !MARKS.contains(cell)
        {
            *cell = mark;
        }
    }
}

impl Canvas for Text {
    fn line(&mut self, points: &[Point], color: Color, _: f64, dashed: bool) {
        if color == GRID {
            return;
        }
        for pair in points.windows(2) {
            let [a, b] = [pair[0], pair[1]];
            let (dx, dy) = (b.0 - a.0, b.1 - a.1);
            let mark = match mark_of(color) {
                Some(_) if dashed => '.',
                Some(mark) => mark,
                None if dy == 0.0 => '-',
                None => '|',
            };
            let steps = (dx.abs() / CELL.0).max(dy.abs() / CELL.1).ceil().max(1.0);
            let mut step = 0.0;
            while step <= steps {
                let part = step / steps;
                self.put((a.0 + dx * part, a.1 + dy * part), mark);
                step += 1.0;
            }
        }
    }

    fn dot(&mut self, at: Point, _: f64, color: Color) {
        if let Some(mark) = mark_of(color) {
            self.put(at, mark);
        }
    }

    fn text(&mut self, (x, y): Point, anchor: Anchor, text: &str) {
        let length = text.chars().count();
        let at = index(x, CELL.0);
        let left = match anchor {
            Anchor::Start => at,
            Anchor::Middle => at.saturating_sub(length / 2),
            Anchor::End => at.saturating_sub(length),
        };
        let Some(row) = self.cells.get_mut(index(y - CELL.1 / 2.0, CELL.1)) else {
            return;
        };
        // A sample of a line may end right before its name.
        let before = left.checked_sub(1).and_then(|before| row.get(before));
        let joined = before.is_some_and(|before| *before != ' ');
        let cells = row.iter_mut().skip(left + usize::from(joined));
        for (cell, character) in cells.zip(text.chars()) {
            *cell = character;
        }
    }
}

fn mark_of(color: Color) -> Option<char> {
    let place = PALETTE.iter().position(|known| *known == color)?;
    (color != INK).then_some(MARKS[place])
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, and what lies outside of the page is not drawn"
)]
fn index(at: f64, cell: f64) -> usize {
    (at / cell).floor() as usize
}
