use std::io::{self, IsTerminal};

/// The terminal, file or pipe that receives the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// The number of columns.
    pub width: u16,
    /// Whether the terminal shows colours.
    pub colours: bool,
}

/// The width for a file or a pipe, because the terminal of its reader is not known.
const REDIRECTED_WIDTH: u16 = 80;
/// The maximum width that is used. On wider lines, the numbers would be too far from their names.
const WIDTH_MAX: u16 = 100;
/// The minimum width. On a narrower terminal the layout does not fit, and the output wraps.
const WIDTH_MIN: u16 = 40;

impl Terminal {
    /// The output goes to a file or a pipe.
    pub const REDIRECTED: Self = Self { width: REDIRECTED_WIDTH, colours: false };

    /// Returns a terminal of this width.
    pub fn new(width: u16, colours: bool) -> Self {
        Self { width: width.clamp(WIDTH_MIN, WIDTH_MAX), colours }
    }

    /// Returns standard output, with colours unless `NO_COLOR` is set or the terminal is `dumb`.
    pub fn stdout() -> Self {
        if !io::stdout().is_terminal() {
            return Self::REDIRECTED;
        }
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let colours = set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb");
        Self::new(comfy_table::Table::new().width().unwrap_or(REDIRECTED_WIDTH), colours)
    }

    /// Colours the text green.
    pub(super) fn good(self, text: &str) -> String {
        self.coloured("32", text)
    }

    /// Colours the text red and bold.
    pub(super) fn bad(self, text: &str) -> String {
        self.coloured("1;31", text)
    }

    fn coloured(self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
