//! Shows a progress bar if standard error is a terminal, and nothing otherwise.

use std::time::Duration;

use annals_kafka::Contents;
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};

use crate::stop::Stop;

/// The interval between redraws while the position stays the same.
const TICK: Duration = Duration::from_millis(200);
/// The minimum width for the whole template with a visible bar.
const COLUMNS_WIDE: u16 = 75;

/// Returns a progress bar on standard error. `total` is the value that [`ProgressBar::position`] has at the end.
/// Requires a [`Stop`], because people press Ctrl-C as soon as they see a bar, so the command must already listen for
/// Ctrl-C.
pub(crate) fn bar(what: &'static str, total: u64, _listening: &Stop) -> ProgressBar {
    draw(what, total)
}

/// Returns a progress bar for reading a topic, message by message. All commands that read topics listen for
/// Ctrl-C before they connect.
pub(crate) fn topic_bar(what: &'static str, contents: &Contents) -> ProgressBar {
    let total: i64 = contents.partitions().iter().map(|range| range.end - range.start).sum();
    draw(what, total.unsigned_abs())
}

fn draw(what: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = match Table::new().width() {
        Some(COLUMNS_WIDE..) => "{prefix} {wide_bar:.cyan/blue} {human_pos}/{human_len}  {per_sec}  {eta} left",
        // A line that is too long wraps, and the next redraw would overwrite only one of its parts.
        _ => "{prefix} {human_pos:.cyan}/{human_len} {eta} left",
    };
    // Without this style, the bar still works, so an invalid template is not an error.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(what);
    bar.enable_steady_tick(TICK);
    bar
}
