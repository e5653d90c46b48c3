use std::io::{self, IsTerminal};

/// What the output goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// How many columns it has.
    pub width: u16,
    /// Whether it shows colours.
    pub colours: bool,
}

/// The width of what is not a terminal: a file or a pipe, to be read later, somewhere.
const REDIRECTED_WIDTH: u16 = 80;
/// A wide terminal is not filled: numbers far from their names are hard to read.
const WIDTH_MAX: u16 = 100;
/// Narrower than this nothing can be laid out; what is written then wraps.
const WIDTH_MIN: u16 = 40;

impl Terminal {
    /// A file or a pipe.
    pub const REDIRECTED: Self = Self { width: REDIRECTED_WIDTH, colours: false };

    /// A terminal of this width.
    pub fn new(width: u16, colours: bool) -> Self {
        Self { width: width.clamp(WIDTH_MIN, WIDTH_MAX), colours }
    }

    /// Standard output, with its colours unless `NO_COLOR` is set or the terminal is `dumb`.
    pub fn stdout() -> Self {
        if !io::stdout().is_terminal() {
            return Self::REDIRECTED;
        }
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let colours = set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb");
        Self::new(comfy_table::Table::new().width().unwrap_or(REDIRECTED_WIDTH), colours)
    }

    /// Green.
    pub(super) fn good(self, text: &str) -> String {
        self.coloured("32", text)
    }

    /// Red and bold.
    pub(super) fn bad(self, text: &str) -> String {
        self.coloured("1;31", text)
    }

    fn coloured(self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
