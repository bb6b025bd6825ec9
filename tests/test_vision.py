"""The parts of vision that judge and policy share; stored weights depend on their layout."""

import pytest
import torch

from prophet_gym.vision import FiLMBlock, coordinates, soft_argmax


def test_soft_argmax_gives_all_y_then_all_x_from_top_left():
    maps = torch.full((1, 2, 5, 9), -50.0)
    maps[0, 0, 0, 8] = maps[0, 1, 2, 0] = 50.0  # top right, middle left
    assert torch.allclose(soft_argmax(maps), torch.tensor([[-1.0, 0.0, 1.0, -1.0]]), atol=1e-6)
    assert torch.allclose(soft_argmax(torch.zeros(3, 4, 6, 6)), torch.zeros(3, 8), atol=1e-6)


def test_coordinates_are_those_that_soft_argmax_reports():
    grid = coordinates(torch.zeros(2, 3, 4, 6))
    assert grid.shape == (2, 2, 4, 6) and torch.equal(grid[0], grid[1])
    assert grid[0, :, 0, 0].tolist() == [-1, -1] and grid[0, :, 3, 0].tolist() == [1, -1]
    maps = torch.full((1, 1, 4, 6), -50.0)
    maps[0, 0, 2, 3] = 50.0
    assert torch.allclose(soft_argmax(maps)[0], grid[0, :, 2, 3], atol=1e-6)


@pytest.mark.parametrize(("channels", "stride", "residual"), [(8, 1, True), (8, 2, False), (16, 1, False)])
def test_block_is_modulated_and_residual_only_where_shapes_agree(channels, stride, residual):
    torch.manual_seed(0)
    block = FiLMBlock(8, channels, text_dim=5, stride=stride)
    assert set(block.state_dict()) == {"conv.weight", "norm.weight", "norm.bias", "film.weight", "film.bias"}
    x, text = torch.randn(3, 8, 6, 6), torch.randn(3, 5)
    out = block(x, text)
    assert out.shape == (3, channels, 6 // stride, 6 // stride)
    assert not torch.allclose(out, block(x, -text), atol=1e-3)
    assert torch.allclose(out[1:2], block(x[1:2], text[1:2]), atol=1e-6)
    torch.nn.init.zeros_(block.norm.weight)
    torch.nn.init.zeros_(block.film.weight)
    assert torch.equal(block(x, text), x if residual else torch.zeros_like(out))
