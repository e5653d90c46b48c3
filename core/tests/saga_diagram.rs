//! The drawings of plans.
#![allow(clippy::unwrap_used)]

use annals::{Saga, SagaState, saga::StepRequest};
use serde::{Deserialize, Serialize};

#[derive(Clone, Serialize, Deserialize)]
struct Any;
impl SagaState for Any {}

fn ask(_: &Any) -> StepRequest {
    unreachable!("a drawing asks nothing")
}

fn checkout() -> Saga<Any> {
    Saga::named("checkout")
        .compensatable("reserve stock", ask)
        .undo(ask)
        .compensatable("charge card", ask)
        .undo(ask)
        .and(ask)
        .undo(ask)
        .pivot("confirm order", ask)
        .retriable("ship", ask)
        .retriable("notify customer", ask)
        .when_compensated("cancel order", ask)
        .when_compensated("notify of cancellation", ask)
        .build()
}

/// A plan with a step name that would break out of Mermaid or XML if it were not escaped.
fn odd() -> Saga<Any> {
    let name = "a \"b\" <c> & #d\n`退货`";
    Saga::named("odd").compensatable(name, ask).undo(ask).build()
}

fn plans() -> Vec<Saga<Any>> {
    vec![
        checkout(),
        odd(),
        Saga::named("pivot").pivot("pay", ask).when_compensated("apologise to the customer at length", ask).build(),
        Saga::named("alone").pivot("pay", ask).build(),
        Saga::named("return").retriable("restock", ask).retriable("refund", ask).build(),
        Saga::named("two")
            .compensatable("x", ask)
            .undo(ask)
            .compensatable("y", ask)
            .undo(ask)
            .retriable("z", ask)
            .build(),
    ]
}

#[test]
fn mermaid_shows_steps_and_compensations() {
    let expected = r#"flowchart LR
    start((" ")) --> s0["reserve stock"]
    s0 --> s1["charge card ×2"]
    s1 --> s2{{"confirm order"}}
    s2 --> s3["ship"]
    s3 --> s4["notify customer"]
    s4 --> completed(["completed"])
    u1["undo charge card ×2"]
    u0["undo reserve stock"]
    c0["cancel order"]
    c1["notify of cancellation"]
    compensated(["compensated"])
    u1 -.-> u0
    u0 -.-> c0
    c0 -.-> c1
    c1 -.-> compensated
    s0 -. fails .-> u0
    s1 -. fails .-> u1
    s2 -. refused .-> u1
"#;
    assert_eq!(checkout().mermaid(), expected);
}

#[test]
fn mermaid_escapes_names() {
    let text = odd().mermaid();
    assert!(text.contains(r##"s0["a #quot;b#quot; #60;c#62; #38; #35;d #96;退货#96;"]"##), "{text}");
}

#[test]
fn saga_without_undo_draws_no_compensation() {
    let saga = Saga::<Any>::named("return").retriable("restock", ask).when_compensated("never", ask).build();
    let expected = "flowchart LR\n    start((\" \")) --> s0[\"restock\"]\n    s0 --> completed([\"completed\"])\n";
    assert_eq!(saga.mermaid(), expected);
    assert!(!saga.svg().contains("class=\"back\""), "{}", saga.svg());
}

#[test]
fn svg_escapes_names() {
    let svg = odd().svg();
    assert!(svg.contains("<title>Saga odd</title>"), "{svg}");
    assert!(svg.contains(">undo a &quot;b&quot; &lt;c&gt; &amp; #d `退货`</text>"), "{svg}");
}

#[test]
fn svg_equals_the_recorded_svg() {
    let svg = Saga::<Any>::named("alone").pivot("pay", ask).build().svg();
    let (head, body) = svg.split_once("</defs>\n").unwrap();
    let start = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"287\" height=\"162\" viewBox=\"0 0 287 162\" class=\"saga\" \
                 role=\"img\">\n<title>Saga alone</title>\n<style>";
    assert!(head.starts_with(start), "{head}");
    let expected = r#"
<circle class="dot" cx="19" cy="35" r="7"/>
<path class="forward" d="M26 35h32"/>
<g class="pivot"><rect x="66" y="12" width="73" height="46" rx="8"/><text x="102" y="33">pay</text><text class="caption" x="102" y="49">decides</text></g>
<path class="forward" d="M139 35h32"/>
<g class="end"><rect x="179" y="19" width="96" height="32" rx="16"/><text x="227" y="40">completed</text></g>
<text class="note" x="109" y="86">refused</text>
<path class="back" d="M102 58v45"/>
<g class="end"><rect x="46" y="111" width="112" height="32" rx="16"/><text x="102" y="132">compensated</text></g>
</svg>
"#;
    assert_eq!(body, expected.trim_start());
}

/// The rectangles of a drawing: x, y, width, height.
fn boxes(svg: &str) -> Vec<[i32; 4]> {
    let number = |tag: &str, name: &str| {
        let (_, rest) = tag.split_once(&format!(" {name}=\"")).unwrap();
        rest.split_once('"').unwrap().0.parse().unwrap()
    };
    let tags = svg.split("<rect").skip(1).map(|rest| rest.split_once("/>").unwrap().0);
    tags.map(|tag| ["x", "y", "width", "height"].map(|name| number(tag, name))).collect()
}

#[test]
fn boxes_do_not_overlap_and_stay_on_the_page() {
    for saga in plans() {
        let svg = saga.svg();
        let boxes = boxes(&svg);
        let page: Vec<i32> = svg.split('"').skip(3).step_by(2).take(2).map(|side| side.parse().unwrap()).collect();
        for (number, [x, y, width, height]) in boxes.iter().enumerate() {
            assert!(*x > 0 && x + width < page[0] && *y > 0 && y + height < page[1], "{}: box {number}", saga.name());
            for [other_x, other_y, other_width, other_height] in &boxes[..number] {
                let beside = x >= &(other_x + other_width) || *other_x >= x + width;
                let above = y >= &(other_y + other_height) || *other_y >= y + height;
                assert!(beside || above, "{}: box {number} overlaps another: {boxes:?}", saga.name());
            }
        }
    }
}
