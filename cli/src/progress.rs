//! How far it is, on a terminal; nothing elsewhere.

use std::time::Duration;

use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};

/// How often the bar is drawn while nothing moves.
const TICK: Duration = Duration::from_millis(200);
/// What all of it takes, with a bar that one can see.
const COLUMNS_WIDE: u16 = 75;

/// A bar on standard error. `total` is what [`ProgressBar::position`] ends at.
pub(crate) fn bar(what: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = match Table::new().width() {
        Some(COLUMNS_WIDE..) => "{prefix} {wide_bar:.cyan/blue} {human_pos}/{human_len}  {per_sec}  {eta} left",
        // A line that is too long is broken into two, and those are not drawn over.
        _ => "{prefix} {human_pos:.cyan}/{human_len} {eta} left",
    };
    // Without its style a bar is still one: the template is no reason to fail.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(what);
    bar.enable_steady_tick(TICK);
    bar
}
