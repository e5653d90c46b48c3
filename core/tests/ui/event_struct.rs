#[derive(annals::Event)]
struct OrderPlaced {
    order_id: String,
}

fn main() {}
