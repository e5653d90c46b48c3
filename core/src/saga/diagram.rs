//! Draws a plan as Mermaid text for pages that render Mermaid, or as SVG for other pages.

use std::fmt::Write;

use super::definition::{Kind, PlannedStep, Saga};

impl<C> Saga<C> {
    /// Returns the plan as a [Mermaid](https://mermaid.js.org) flowchart. Solid arrows go forward, and dashed arrows go
    /// back.
    ///
    /// ```
    /// # use annals::{Saga, SagaState, saga::StepRequest};
    /// # #[derive(Clone, serde::Serialize, serde::Deserialize)]
    /// # struct Trip;
    /// # impl SagaState for Trip {}
    /// # fn ask(_: &Trip) -> StepRequest { unreachable!() }
    /// let trip = Saga::named("trip").compensatable("book", ask).undo(ask).pivot("pay", ask).build();
    /// assert_eq!(
    ///     trip.mermaid(),
    ///     r#"flowchart LR
    ///     start((" ")) --> s0["book"]
    ///     s0 --> s1{{"pay"}}
    ///     s1 --> completed(["completed"])
    ///     u0["undo book"]
    ///     compensated(["compensated"])
    ///     u0 -.-> compensated
    ///     s0 -. fails .-> u0
    ///     s1 -. refused .-> u0
    /// "#
    /// );
    /// ```
    pub fn mermaid(&self) -> String {
        let mut text = "flowchart LR\n".to_owned();
        let mut from = "start((\" \"))".to_owned();
        let mut line = |line: &str| _ = writeln!(text, "    {line}");
        for (step, planned) in self.steps.iter().enumerate() {
            let name = mermaid_text(&label(planned, ""));
            let (open, close) = if planned.kind == Kind::Pivot { ("{{", "}}") } else { ("[", "]") };
            line(&format!("{from} --> s{step}{open}{name}{close}"));
            from = format!("s{step}");
        }
        line(&format!("{from} --> completed([\"completed\"])"));
        let Some(last) = self.last_that_goes_back() else { return text };
        let undos = self.undos();
        let mut back = Vec::new();
        for step in (0..undos).rev() {
            back.push((format!("u{step}"), format!("[{}]", mermaid_text(&label(&self.steps[step], "undo ")))));
        }
        for (step, planned) in self.closing.iter().enumerate() {
            back.push((format!("c{step}"), format!("[{}]", mermaid_text(&label(planned, "")))));
        }
        back.push(("compensated".to_owned(), "([\"compensated\"])".to_owned()));
        for (id, shape) in &back {
            line(&format!("{id}{shape}"));
        }
        for pair in back.windows(2) {
            line(&format!("{} -.-> {}", pair[0].0, pair[1].0));
        }
        for step in 0..undos {
            line(&format!("s{step} -. fails .-> u{step}"));
        }
        if last == undos {
            line(&format!("s{last} -. refused .-> {}", back[0].0));
        }
        text
    }

    /// Returns the plan as a standalone SVG, which is readable on light and dark backgrounds. The width depends on the
    /// plan. The forward path is at the top; below it, from right to left, are the undos; below them are the steps that
    /// end a compensated saga.
    ///
    /// ```
    /// # use annals::{Saga, SagaState, saga::StepRequest};
    /// # #[derive(Clone, serde::Serialize, serde::Deserialize)]
    /// # struct Trip;
    /// # impl SagaState for Trip {}
    /// # fn ask(_: &Trip) -> StepRequest { unreachable!() }
    /// let trip = Saga::named("trip").compensatable("book", ask).undo(ask).pivot("pay", ask).build();
    /// assert!(trip.svg().starts_with("<svg xmlns="));
    /// ```
    pub fn svg(&self) -> String {
        let mut canvas = Canvas::default();
        let top = MARGIN;
        let mut x = canvas.dot(MARGIN, top);
        let mut columns = Vec::new();
        for planned in &self.steps {
            let name = label(planned, "");
            let kind = caption(planned.kind);
            let undo = if planned.kind == Kind::Compensatable { box_width(&label(planned, "undo "), "") } else { 0 };
            let width = box_width(&name, kind).max(undo);
            canvas.arrow(&format!("M{x} {}h{}", top + BOX / 2, GAP - TIP), "forward");
            x += GAP;
            canvas.node(x, top, width, class(planned.kind), &name, kind);
            columns.push((x, width));
            x += width;
        }
        canvas.arrow(&format!("M{x} {}h{}", top + BOX / 2, GAP - TIP), "forward");
        canvas.end(x + GAP, top, "completed");
        let Some(last) = self.last_that_goes_back() else { return canvas.finish(self.name) };

        let undos = self.undos();
        let below = top + ROW;
        let center = |column: (i32, i32)| column.0 + column.1 / 2;
        for step in (0..undos).rev() {
            let (x, width) = columns[step];
            canvas.node(x, below, width, "undo", &label(&self.steps[step], "undo "), "");
            canvas.arrow(&format!("M{} {}v{}", center(columns[step]), top + BOX, ROW - BOX - TIP), "back");
            canvas.note(center(columns[step]), top + BOX + 28, "fails");
            if step > 0 {
                let (to, width) = columns[step - 1];
                canvas.arrow(&format!("M{x} {}H{}", below + BOX / 2, to + width + TIP), "back");
            }
        }
        // The arrow down to the end of the saga starts at the undo of the first step. If no step has an undo, the arrow
        // starts at the last step from which the saga can go back.
        let (from, mut y) = if undos > 0 { (center(columns[0]), below) } else { (center(columns[last]), top) };
        if last == undos {
            let pivot = center(columns[last]);
            canvas.note(pivot, top + BOX + 28, "refused");
            if let Some((to, width)) = undos.checked_sub(1).map(|undo| columns[undo]) {
                let turn = ROW - BOX / 2;
                canvas.arrow(&format!("M{pivot} {}v{turn}H{}", top + BOX, to + width + TIP), "back");
            }
        }
        let inset = if self.closing.is_empty() { END_INSET } else { 0 };
        canvas.arrow(&format!("M{from} {}v{}", y + BOX, ROW - BOX - TIP + inset), "back");
        y += ROW;
        let mut x = None;
        for planned in &self.closing {
            let name = label(planned, "");
            let kind = caption(planned.kind);
            let width = box_width(&name, kind);
            let at = canvas.next(&mut x, from, y, width);
            canvas.node(at, y, width, class(planned.kind), &name, kind);
        }
        let at = canvas.next(&mut x, from, y, box_width("compensated", ""));
        canvas.end(at, y, "compensated");
        canvas.finish(self.name)
    }

    /// Returns the number of steps, counted from the first, that have an undo.
    fn undos(&self) -> usize {
        self.steps.iter().take_while(|step| step.kind == Kind::Compensatable).count()
    }

    /// Returns the last step from which the saga can go back.
    fn last_that_goes_back(&self) -> Option<usize> {
        self.steps.iter().rposition(|step| step.kind != Kind::Retriable)
    }
}

fn label<C>(planned: &PlannedStep<C>, prefix: &str) -> String {
    let name = planned.name.replace(char::is_control, " ");
    match planned.calls.len() {
        0 | 1 => format!("{prefix}{name}"),
        calls => format!("{prefix}{name} ×{calls}"),
    }
}

pub(super) fn mermaid_text(text: &str) -> String {
    let mut escaped = "\"".to_owned();
    for character in text.chars() {
        match character {
            '"' => escaped += "#quot;",
            '#' | '&' | '<' | '>' | '`' | '\\' => _ = write!(escaped, "#{};", u32::from(character)),
            plain => escaped.push(plain),
        }
    }
    escaped + "\""
}

fn xml_text(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn class(kind: Kind) -> &'static str {
    match kind {
        Kind::Compensatable => "compensatable",
        Kind::Pivot => "pivot",
        Kind::Retriable => "retriable",
        Kind::Closing => "closing",
    }
}

fn caption(kind: Kind) -> &'static str {
    match kind {
        Kind::Compensatable => "can be undone",
        Kind::Pivot => "decides",
        Kind::Retriable | Kind::Closing => "until it succeeds",
    }
}

pub(super) const MARGIN: i32 = 12;
/// The height of a box.
pub(super) const BOX: i32 = 46;
/// The distance from the top of one row to the top of the next.
const ROW: i32 = 92;
/// The distance between two boxes in a row.
pub(super) const GAP: i32 = 40;
/// The length of an arrowhead, which extends beyond the end of the arrow's line.
pub(super) const TIP: i32 = 8;
/// The shape that marks a saga's end is less tall than a box: it starts this far below the top of a box, and ends this
/// far above the bottom.
const END_INSET: i32 = 7;
/// The width of the dot at which a saga starts.
const DOT: i32 = 14;

/// Returns a width that is enough for the text in any common font, because the font of the page is unknown.
pub(super) fn box_width(name: &str, caption: &str) -> i32 {
    let wide = |text: &str, narrow, wide| text.chars().map(|c| if c.is_ascii() { narrow } else { wide }).sum::<i32>();
    wide(name, 8, 14).max(wide(caption, 7, 12)).max(48) + 24
}

/// Each colored box sets its own text color, so that the background of the page does not matter. Text outside of the
/// boxes is gray, which is readable on white and on black.
const STYLE: &str = "\
.saga text{font:14px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;text-anchor:middle;fill:#1f2328}
.saga .caption{font-size:11px;fill-opacity:.75}
.saga .note{font-size:11px;fill:#7d8590;text-anchor:start}
.saga rect{stroke-width:1.5}
.saga .compensatable rect{fill:#dbeafe;stroke:#3b82f6}
.saga .pivot rect{fill:#fde68a;stroke:#d97706;stroke-width:3}
.saga .retriable rect{fill:#dcfce7;stroke:#16a34a}
.saga .undo rect{fill:#fee2e2;stroke:#dc2626}
.saga .closing rect{fill:#f3e8ff;stroke:#9333ea}
.saga .end rect{fill:none;stroke:#7d8590}
.saga .end text,.saga .dot{fill:#7d8590}
.saga path{fill:none;stroke:#7d8590;stroke-width:1.5;marker-end:url(#saga-tip)}
.saga .back{stroke-dasharray:5 4}
.saga marker path{fill:#7d8590;stroke:none;marker-end:none}";

#[derive(Default)]
pub(super) struct Canvas {
    body: String,
    right: i32,
    bottom: i32,
}

impl Canvas {
    fn draw(&mut self, right: i32, bottom: i32, element: &str) {
        self.right = self.right.max(right);
        self.bottom = self.bottom.max(bottom);
        self.body += element;
        self.body.push('\n');
    }

    pub fn node(&mut self, x: i32, y: i32, width: i32, class: &str, name: &str, caption: &str) {
        let center = x + width / 2;
        let name = xml_text(name);
        let baseline = y + if caption.is_empty() { 28 } else { 21 };
        let mut element =
            format!(r#"<g class="{class}"><rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="8"/>"#);
        _ = write!(element, r#"<text x="{center}" y="{baseline}">{name}</text>"#);
        if !caption.is_empty() {
            _ = write!(element, r#"<text class="caption" x="{center}" y="{}">{caption}</text>"#, y + 37);
        }
        self.draw(x + width, y + BOX, &(element + "</g>"));
    }

    pub fn end(&mut self, x: i32, y: i32, name: &str) {
        let width = box_width(name, "");
        let top = y + END_INSET;
        let height = BOX - 2 * END_INSET;
        let rect = format!(r#"<rect x="{x}" y="{top}" width="{width}" height="{height}" rx="{}"/>"#, height / 2);
        let text = format!(r#"<text x="{}" y="{}">{name}</text>"#, x + width / 2, y + 28);
        self.draw(x + width, y + BOX, &format!(r#"<g class="end">{rect}{text}</g>"#));
    }

    /// Draws the start of a saga and returns its right edge.
    pub fn dot(&mut self, x: i32, y: i32) -> i32 {
        let radius = DOT / 2;
        let element = format!(r#"<circle class="dot" cx="{}" cy="{}" r="{radius}"/>"#, x + radius, y + BOX / 2);
        self.draw(x + DOT, y + BOX, &element);
        x + DOT
    }

    pub fn arrow(&mut self, path: &str, class: &str) {
        self.draw(0, 0, &format!(r#"<path class="{class}" d="{path}"/>"#));
    }

    pub fn note(&mut self, x: i32, y: i32, text: &str) {
        self.draw(x + 60, y, &format!(r#"<text class="note" x="{}" y="{y}">{text}</text>"#, x + 7));
    }

    /// Returns the left edge of the next box in a row. The first box is centered under the arrow from above; each later
    /// box is at the end of an arrow.
    fn next(&mut self, x: &mut Option<i32>, from: i32, y: i32, width: i32) -> i32 {
        let at = match *x {
            None => MARGIN.max(from - width / 2),
            Some(x) => {
                self.arrow(&format!("M{x} {}h{}", y + BOX / 2, GAP - TIP), "back");
                x + GAP
            }
        };
        *x = Some(at + width);
        at
    }

    pub fn finish(self, name: &str) -> String {
        let width = self.right + MARGIN;
        let height = self.bottom + MARGIN;
        let name = xml_text(name);
        let tip = r#"<marker id="saga-tip" viewBox="0 0 8 8" refX="0" refY="4" markerWidth="8" markerHeight="8""#;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             class=\"saga\" role=\"img\">\n<title>Saga {name}</title>\n<style>{STYLE}</style>\n<defs>{tip} markerUnits=\"userSpaceOnUse\" \
             orient=\"auto\"><path d=\"M0 0L8 4L0 8z\"/></marker></defs>\n{}</svg>\n",
            self.body
        )
    }
}
