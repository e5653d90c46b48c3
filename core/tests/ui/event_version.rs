#[derive(annals::Event)]
enum OrderEvent {
    #[event(version = 0)]
    Zero,
    #[event(version = -1)]
    Negative,
    #[event(version = 3000000000)]
    TooLarge,
    #[event(version = "2")]
    Text,
}

fn main() {}
