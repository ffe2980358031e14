"""The graphs that people read, pinned. Accept an intended change with EXPECTTEST_ACCEPT=1."""

import torch
from expecttest import TestCase
from functorch.compile import aot_function, make_boxed_func

from altgrad.quantization import E4M3, E5M2, decode, encode, quantize


class Layer(torch.nn.Module):
    def forward(self, x, w, scale):
        return torch.relu(quantize(x, E5M2, scale) @ quantize(w, E4M3, 0.5))


class Codec(torch.nn.Module):
    def forward(self, x, scale):
        return decode(encode(x, E4M3, scale, saturation="none"), E4M3, scale, dtype=torch.bfloat16)


def readable(graph_module):
    return "\n".join(line.rstrip() for line in graph_module.code.strip().splitlines())


class TestGraphs(TestCase):
    def test_exported_layer(self):
        args = torch.randn(4, 3), torch.randn(3, 2), torch.tensor(1.0)
        program = torch.export.export(Layer(), args)
        self.assertExpectedInline(
            readable(program.graph_module),
            """\
def forward(self, x, w, scale):
    quantize = torch.ops.altgrad.quantize.default(x, scale, 'E5M2');  x = scale = None
    full = torch.ops.aten.full.default([], 0.5, dtype = torch.float32, device = device(type='cpu'), pin_memory = False)
    quantize_1 = torch.ops.altgrad.quantize.default(w, full, 'E4M3');  w = full = None
    matmul = torch.ops.aten.matmul.default(quantize, quantize_1);  quantize = quantize_1 = None
    relu = torch.ops.aten.relu.default(matmul);  matmul = None
    return (relu,)""",
        )

    def test_exported_codec(self):
        program = torch.export.export(Codec(), (torch.randn(4, 3), torch.tensor(1.0)))
        self.assertExpectedInline(
            readable(program.graph_module),
            """\
def forward(self, x, scale):
    encode = torch.ops.altgrad.encode.default(x, scale, 'E4M3', 'none');  x = None
    decode = torch.ops.altgrad.decode.default(encode, scale, 'E4M3', torch.bfloat16);  encode = scale = None
    return (decode,)""",
        )

    def joint_graphs(self, f, *args):
        graphs = []

        def record(graph_module, inputs):
            graphs.append(readable(graph_module))
            return make_boxed_func(graph_module.forward)

        out = aot_function(f, fw_compiler=record, bw_compiler=record)(*args)
        out.sum().backward()
        return "\n".join(graphs)

    def test_aot_graphs_of_quantize(self):
        x = torch.randn(4, requires_grad=True)
        self.assertExpectedInline(
            self.joint_graphs(lambda x: quantize(x, E5M2, 0.5) * 2, x),
            """\
def forward(self, primals_1):
    full = torch.ops.aten.full.default([], 0.5, dtype = torch.float32, device = device(type='cpu'), pin_memory = False)
    div = torch.ops.aten.div.Tensor(primals_1, full)
    abs_1 = torch.ops.aten.abs.default(div)
    clamp = torch.ops.aten.clamp.default(abs_1, None, 57344.0)
    mul = torch.ops.aten.mul.Tensor(clamp, 2097152.0)
    add = torch.ops.aten.add.Tensor(mul, clamp);  mul = None
    sub = torch.ops.aten.sub.Tensor(add, clamp)
    sub_1 = torch.ops.aten.sub.Tensor(add, sub);  add = sub = None
    mul_1 = torch.ops.aten.mul.Tensor(clamp, 65536.0)
    round_1 = torch.ops.aten.round.default(mul_1);  mul_1 = None
    mul_2 = torch.ops.aten.mul.Tensor(round_1, 1.52587890625e-05);  round_1 = None
    lt_1 = torch.ops.aten.lt.Scalar(clamp, 6.103515625e-05);  clamp = None
    where = torch.ops.aten.where.self(lt_1, mul_2, sub_1);  lt_1 = mul_2 = sub_1 = None
    eq = torch.ops.aten.eq.Scalar(abs_1, inf)
    where_1 = torch.ops.aten.where.self(eq, abs_1, where);  eq = abs_1 = where = None
    copysign = torch.ops.aten.copysign.Tensor(where_1, div);  where_1 = div = None
    mul_3 = torch.ops.aten.mul.Tensor(copysign, full);  copysign = full = None
    empty_like = torch.ops.aten.empty_like.default(primals_1, dtype = torch.float32, pin_memory = False);  primals_1 = None
    copy = torch.ops.aten.copy.default(empty_like, mul_3);  empty_like = mul_3 = None
    mul_4 = torch.ops.aten.mul.Tensor(copy, 2);  copy = None
    return (mul_4,)
def forward(self, tangents_1):
    mul_5 = torch.ops.aten.mul.Tensor(tangents_1, 2);  tangents_1 = None
    return (mul_5,)""",
        )
