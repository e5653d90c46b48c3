#[derive(annals::Event)]
#[event(prefix = "order")]
enum OrderEvent {
    Placed,
    #[event(name = "order.placed")]
    PlacedByHand,
}

fn main() {}
