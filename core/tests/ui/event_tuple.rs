#[derive(annals::Event)]
enum OrderEvent {
    Placed(String, u64),
    Closed(),
    Fine(String),
}

fn main() {}
