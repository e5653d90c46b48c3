//! Shows progress on a terminal, and nothing elsewhere.

use std::time::Duration;

use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};

/// The interval at which the bar is drawn while nothing moves.
const TICK: Duration = Duration::from_millis(200);
/// The width that the whole template needs, with a visible bar.
const COLUMNS_WIDE: u16 = 75;

/// Returns a bar on standard error. `total` is the last value of [`ProgressBar::position`].
pub(crate) fn bar(what: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = match Table::new().width() {
        Some(COLUMNS_WIDE..) => "{prefix} {wide_bar:.cyan/blue} {human_pos}/{human_len}  {per_sec}  {eta} left",
        // A line that is too long wraps, and the next drawing would not cover both parts.
        _ => "{prefix} {human_pos:.cyan}/{human_len} {eta} left",
    };
    // Without its style the bar still works, so an invalid template is not an error.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(what);
    bar.enable_steady_tick(TICK);
    bar
}
