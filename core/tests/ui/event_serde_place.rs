#[derive(annals::Event)]
#[serde(tag = "type")]
enum OnTheEnum {
    Placed,
}

#[derive(annals::Event)]
enum OnAVariant {
    #[serde(rename = "order.placed")]
    Renamed,
    #[serde(rename_all = "camelCase")]
    Fine { order_id: String },
}

fn main() {}
